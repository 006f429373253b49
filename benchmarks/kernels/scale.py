"""What wide SAEs would take on many GPUs: memory, bytes moved and time of a step, by arithmetic; docs/scale.md has it.

    python -m benchmarks.kernels.scale [--width 131072,524288,1048576] [--gpus 8,64] [--d-in 2304] [--all]

No such run has been made. A step's time on one GPU is that of `benchmarks/kernels/model.py` at an H100's rates, times
what a step measured on an H200 took over the model's. The rates of links are those of data sheets times EFFICIENCY, an
assumption; nothing overlaps. Of the ways to split the width over a team the fastest that fits is shown, or `--all`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.kernels import model

H100_MEMORY, H200_MEMORY = 3.35e12, 4.8e12  # bytes a second, by data sheet
# On an H200 a topk step (d_in 768, 65,536 latents, batch 8,192, k 50) took 10.2 ms, before two kernels were measured to
# take 1.62 ms and 2 × 1.76 ms less (kernels/README.md).
MEASURED = 10.2 - (3.42 - 1.80) - 2 * (2.06 - 0.30)
AT = model.Sizes("topk", 768, 65_536, 8192, 50)
EFFICIENCY = 0.8
NVLINK, NETWORK = 450e9 * EFFICIENCY, 50e9 * EFFICIENCY  # bytes a second out of one GPU: within a machine, beyond it
A_MACHINE = 8  # GPUs
ROOM = 80e9 * 0.9  # bytes of a GPU that may be taken
LM_WEIGHTS, LM_TO_HOOK, LM_EFFICIENCY = 2.6e9, 1.2e9, 0.45  # Gemma 2 2B at its middle block
BATCHES = 3 + 2 * 4  # that a process holds at a time (runs/plan.py)
BUFFER = 65_536  # activations, or a batch where that is more
TRAINED, COPIES = 16 + 2, 3  # bytes a weight in training with its bfloat16 copy; whole SAEs where one is looked at
WORD = 4


@dataclass(frozen=True)
class Layout:
    """So many latents of an SAE over `gpus`, in teams of `team` that split them; a batch is shared by the teams."""

    width: int
    gpus: int
    team: int
    d_in: int
    tokens: int
    k: int = 50

    @property
    def teams(self) -> int:
        return self.gpus // self.team

    @property
    def weights(self) -> float:
        """Of the whole SAE."""
        return 2.0 * self.width * self.d_in

    def memory(self) -> dict[str, float]:
        """Bytes on the GPU that looks at the SAE."""
        held = max(BUFFER, self.tokens) + BATCHES * self.tokens
        return {
            "training": TRAINED * self.weights / self.team,
            "a look": WORD * self.weights * (COPIES if self.team > 1 else COPIES - 1),
            "activations": WORD * self.d_in * held,
            "model": 2 * LM_WEIGHTS * 1.2,
        }

    def moved(self) -> dict[str, float]:
        """Bytes that a GPU sends in a step."""
        own = self.tokens / self.teams
        sums = WORD * own * self.d_in + WORD * own * self.k
        return {
            "activations": WORD * self.tokens * self.d_in * (1 - 1 / self.gpus),
            "gradients": 2 * (1 - 1 / self.teams) * WORD * self.weights / self.team,
            "sums": 2 * (1 - 1 / self.team) * sums,
        }

    def ms(self) -> dict[str, float]:
        """Milliseconds of a step by part."""
        far = NETWORK if self.gpus > A_MACHINE else NVLINK
        moved = self.moved()
        lm = 2.0 * LM_TO_HOOK * self.tokens / self.gpus / (model.FLOPS * LM_EFFICIENCY)
        return {
            "model": 1e3 * lm,
            "step": step_ms(model.Sizes("topk", self.d_in, self.width // self.team, self.tokens // self.teams, self.k)),
            "activations": 1e3 * moved["activations"] / far,
            # Teams lie within a machine: gradients go between machines once for each of its teams.
            "gradients": 1e3 * moved["gradients"] / far,
            "sums": 1e3 * moved["sums"] / NVLINK,
        }

    @property
    def fits(self) -> bool:
        return sum(self.memory().values()) <= ROOM


def step_ms(sizes: model.Sizes) -> float:
    """A step on one H100: the model's, by the share of it that an H200 reached, memory as slow as an H100's."""
    return model.total(sizes) * MEASURED / model.total(AT) * H200_MEMORY / H100_MEMORY


def layouts(width: int, gpus: int, d_in: int, tokens: int) -> Iterator[Layout]:
    """The ways to split the width within a machine."""
    for team in (1, 2, 4, 8):
        if gpus % team == 0:
            yield Layout(width, gpus, team, d_in, tokens)


def chosen(width: int, gpus: int, d_in: int, tokens: int) -> Layout:
    """The fastest that fits, or, where none does, the one that takes the least memory."""
    every = list(layouts(width, gpus, d_in, tokens))
    fit = [each for each in every if each.fits]
    if fit:
        return min(fit, key=lambda each: sum(each.ms().values()))
    return min(every, key=lambda each: sum(each.memory().values()))


def table(every: list[Layout]) -> str:
    """The layouts as Markdown."""
    memory, moved, ms = ([*part()] for part in (every[0].memory, every[0].moved, every[0].ms))
    head = ["latents", "GPUs", "team", *(f"{name}, GB" for name in memory), "in all, GB"]
    head += [
        *(f"{name} sent, GB" for name in moved),
        *(f"{name}, ms" for name in ms),
        "step in all, ms",
        "500 M tokens, h",
    ]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for each in every:
        in_all, time = sum(each.memory().values()), sum(each.ms().values())
        cells = [f"{each.width:,}", f"{each.gpus}", f"{each.team}", *(f"{x / 1e9:.1f}" for x in each.memory().values())]
        cells += [f"{in_all / 1e9:.0f}" + ("" if each.fits else " (too much)")]
        cells += [*(f"{x / 1e9:.2f}" for x in each.moved().values()), *(f"{x:.0f}" for x in each.ms().values())]
        cells += [f"{time:.0f}", f"{500e6 / each.tokens * time / 6e4:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    integers = lambda text: [int(word) for word in text.split(",")]  # noqa: E731
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=integers, default=[2**17, 2**19, 2**20])
    parser.add_argument("--gpus", type=integers, default=[8, 64])
    parser.add_argument("--d-in", type=int, default=2304)
    parser.add_argument("--tokens-each", type=int, default=2048, help="of a batch, for each GPU")
    parser.add_argument("--all", action="store_true", help="every way to split the width")
    args = parser.parse_args()
    at = [(width, gpus, args.d_in, args.tokens_each * gpus) for gpus in args.gpus for width in args.width]
    print(table([each for sizes in at for each in (layouts(*sizes) if args.all else [chosen(*sizes)])]))


if __name__ == "__main__":
    main()
