"""What a training step on a GPU must move and multiply, part by part: the yardstick that a profile is read against.

    python -m benchmarks.kernels.model                         topk, relu, jumprelu at four sizes, every part
    python -m benchmarks.kernels.model --arch topk --d-in 2304 --d-sae 65536 --batch 8192 --k 50
    python -m benchmarks.kernels.model --summary               two tables: all sizes, and what would save most

Arithmetic, not a measurement: bytes that pass memory, bytes gathered row by row, and operations of products, each over
its rate on an H200; a part takes the longest of the three. Weights are float32, products bfloat16, no latent is dead.
What several programs read of one matrix counts once, but for gathered rows.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass

from sae_train.kernels.shapes import R_ABOVE, plan

# Of one H200: bfloat16 products and memory as measured on some; gathers from L2 are an assumption.
FLOPS, MEMORY, GATHER = 790e12, 4.3e12, 5.5e12
# What of a table is gathered from L2: tables up to this many bytes; rows of larger ones come from memory.
L2 = 50e6
# Bytes of a float32 or an int32, of a bfloat16, and of a candidate: key and latent.
WORD, HALF, CANDIDATE = 4, 2, 8
# Entries that jumprelu has beside its active ones, in the rectangle below the threshold, as a share: an assumption.
NEAR = 0.3
# Bytes of memory that each parameter of a matrix costs where its gradient, projection, Adam and normalisation are one
# pass: weight and both moments read and written, and the bfloat16 copy.
ONE_PASS = 26


@dataclass(frozen=True)
class Part:
    """One part of a step, the names of whose kernels contain `kernel`.

    It moves bytes through memory, and gathers bytes in rows of a table of so many bytes.
    """

    name: str
    kernel: str
    bytes: float = 0.0
    gathered: float = 0.0
    flop: float = 0.0
    table: float = 0.0

    @property
    def ms(self) -> float:
        """The least time it takes on an H200."""
        gather = self.gathered / (GATHER if self.table <= L2 else MEMORY)
        return 1e3 * max(self.bytes / MEMORY, gather, self.flop / FLOPS)


@dataclass(frozen=True)
class Sizes:
    """A step of one architecture: d inputs, F latents, B tokens, k of them active on each."""

    arch: str
    d: int
    F: int
    B: int
    k: int

    @property
    def matrix(self) -> int:
        """Parameters of W_enc, and of W_dec."""
        return self.d * self.F

    @property
    def x(self) -> int:
        """Numbers of a batch."""
        return self.B * self.d

    @property
    def entries(self) -> float:
        """Entries that have a gradient."""
        return self.B * self.k * (1 + NEAR * (self.arch == "jumprelu"))

    @property
    def candidates(self) -> int:
        """Candidates that the encoder writes room for; with a floor it writes the entries alone."""
        return self.B * plan(self.k if self.arch == "topk" else None, self.F, HALF).candidates(self.F)


def parts(s: Sizes) -> list[Part]:
    """Return what our step consists of, in its order."""
    return [*_encoder(s), *_loss(s), *_gradients(s), *_update(s)]


def _encoder(s: Sizes) -> list[Part]:
    product = 2.0 * s.B * s.matrix
    operands = [
        Part("x − b_dec in bfloat16", "elementwise", (WORD + HALF) * s.x),
        Part("W_enc in bfloat16, grouped", "copy", (WORD + HALF) * s.matrix),
    ]
    if s.arch == "topk":
        written = CANDIDATE * s.candidates
        return [
            *operands,
            Part("encoder to candidates", "encode_kernel", HALF * (s.x + s.matrix) + written, flop=product),
            Part("selection", "select_kernel", written + CANDIDATE * s.entries),
        ]
    counts, found = WORD * s.candidates / R_ABOVE, CANDIDATE * s.entries
    return [
        *operands,
        Part("encoder to candidates", "encode_kernel", HALF * (s.x + s.matrix) + counts + found, flop=product),
        Part("offsets of rows", "reduce", counts),
        Part("compaction", "compact_kernel", counts + 2 * found),
        Part("crowded groups", "refill_kernel", counts),
    ]


def _loss(s: Sizes) -> list[Part]:
    rows, flop, W_dec = WORD * s.entries * s.d, 2.0 * s.entries * s.d, WORD * s.matrix
    if s.arch == "topk":
        # In the backward: residual, times two, to bfloat16, and b_dec's sum.
        return [
            Part(
                "decode, error, values' gradient",
                "decode_loss_kernel",
                2 * WORD * s.x,
                rows,
                4.0 * s.entries * s.d,
                W_dec,
            ),
            Part("gradient of the error", "elementwise", 7.5 * WORD * s.x),
        ]
    out = [
        Part("decode", "bag_kernel", WORD * s.x, rows, flop, W_dec),
        # recon − x squared and summed, its backward, and b_dec's sum.
        Part("error and its gradient", "elementwise", 9 * WORD * s.x),
        Part("values' gradient", "dots_kernel", WORD * s.x, rows, flop, W_dec),
    ]
    if s.arch == "relu":  # norms, their backward, and adding that to the decoder's gradient
        return [*out, Part("decoder norms in the L1 and their gradient", "norm", 6 * WORD * s.matrix)]
    return [*out, Part("jumprelu", "jumprelu", 9 * WORD * s.entries)]


def _gradients(s: Sizes) -> list[Part]:
    # Latents with their places through four passes of a radix sort, then tokens and weights in that order.
    sorting = (4 * 2 * (WORD + 8) + 5 * 8) * s.entries
    grad, flop = HALF if s.arch == "topk" else WORD, 2.0 * s.entries * s.d
    return [
        Part("entries by latent", "sort", sorting),
        Part("gradient of W_dec", "bag_kernel", WORD * s.matrix, grad * s.entries * s.d, flop, grad * s.x),
        Part("gradient of W_enc", "bag_kernel", WORD * s.matrix, HALF * s.entries * s.d, flop, HALF * s.x),
        Part("gradient of b_dec", "gemv", WORD * s.matrix),
    ]


def _update(s: Sizes) -> list[Part]:
    return [
        Part("projection of W_dec's gradient", "remove_parallel", 3 * WORD * s.matrix),
        Part("norms of the gradients", "norm", 2 * WORD * s.matrix),
        # Weight, gradient and moments read, and written: the gradient too, since clipping scales it.
        Part("Adam", "adam", 2 * 8 * WORD * s.matrix),
        Part("normalisation of W_dec", "normalise_kernel", 2 * WORD * s.matrix),
    ]


def total(s: Sizes) -> float:
    """Return ms of our step."""
    return sum(part.ms for part in parts(s))


def floor(s: Sizes) -> float:
    """Return ms that no exact sparse step with Adam does without: product, one gather, one pass over the weights."""
    gather = Part("", "", gathered=HALF * s.entries * s.d)
    return Part("", "", flop=2.0 * s.B * s.matrix).ms + gather.ms + Part("", "", 2 * ONE_PASS * s.matrix).ms


def gains(s: Sizes) -> dict[str, float]:
    """Return ms that each of the next steps would save, the largest first; they overlap where they name one part."""
    at = {part.name: part for part in parts(s)}
    moved = lambda n: Part("", "", n).ms  # noqa: E731
    halved = 1e3 * HALF * s.entries * s.d / (GATHER if WORD * s.matrix <= L2 else MEMORY)
    out = {
        # What is left: norms of both gradients, read once, and Adam with unscaled gradients.
        "projection, clipping, Adam and normalisation in two passes": moved((12 + 8 + 64 + 8 - 12 - 56) * s.matrix),
        "bfloat16 moments": moved(2 * 2 * 2 * HALF * s.matrix),
        "gradients, Adam and normalisation in one pass, no gradient kept": moved(
            (8 + 12 + 8 + 64 + 8 - 2 * ONE_PASS) * s.matrix
        ),
        "Adam writes the grouped bfloat16 W_enc": moved(WORD * s.matrix),
        "gradient of b_dec where W_enc's rows are read anyway": at["gradient of b_dec"].ms,
        "both weight gradients over one reading of the sorted entries": moved((8 + WORD) * s.entries),
        "rows of W_dec gathered in bfloat16": halved * (1 if s.arch == "topk" else 2),
    }
    if s.arch == "topk":
        out["encoder and selection in one pass, no candidates"] = moved(2 * CANDIDATE * s.candidates)
    else:
        out["encoder and compaction in one pass"] = at["compaction"].ms + at["offsets of rows"].ms
        out["decode, error and values' gradient in one gather"] = at["values' gradient"].ms + moved(4 * WORD * s.x)
        half = Part("", "", WORD * s.matrix, HALF * s.entries * s.d, 0.0, HALF * s.x).ms
        out["gradient of W_dec from a bfloat16 error"] = at["gradient of W_dec"].ms - half
    if s.arch == "relu":
        out["no gradient for decoder norms, which the projection takes away again"] = moved(5 * WORD * s.matrix)
    return dict(sorted(out.items(), key=lambda item: -item[1]))


def table(s: Sizes) -> str:
    """Return Markdown: every part of a step, the sum, the floor, and what the next gains would be."""
    lines = [f"\n{s.arch}, d {s.d}, F {s.F:,}, B {s.B:,}, k {s.k}", "", "| part | MB | MB gathered | GFLOP | ms |"]
    lines.append("|---|---|---|---|---|")
    for p in parts(s):
        cells = f"{p.bytes / 1e6:,.0f} | {p.gathered / 1e6:,.0f} | {p.flop / 1e9:,.0f} | {p.ms:.3f}"
        lines.append(f"| {p.name} | {cells} |")
    lines.append(f"| **step** (floor {floor(s):.2f}, {100 * floor(s) / total(s):.0f} %) | | | | **{total(s):.2f}** |")
    lines += ["", "| next gain | ms saved |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {ms:.3f} |" for name, ms in gains(s).items())])


def summary(all_sizes: list[Sizes]) -> str:
    """Return Markdown: a step and its floor at all sizes, and the gains by what they save on average."""
    lines = ["| | d | F | encoder | weights | all else | step | floor | floor / step |", "|" + "---|" * 9]
    for s in all_sizes:
        encoder = next(p.ms for p in parts(s) if p.kernel == "encode_kernel")
        weights = sum(p.ms for p in _update(s))
        cells = [encoder, weights, total(s) - encoder - weights, total(s), floor(s)]
        numbers = " | ".join(f"{ms:.2f}" for ms in cells)
        lines.append(f"| {s.arch} | {s.d} | {s.F:,} | {numbers} | {100 * floor(s) / total(s):.0f} % |")
    archs = list(dict.fromkeys(s.arch for s in all_sizes))
    lines += ["", f"| next gain, ms saved of a step on average | {' | '.join(archs)} |", "|---|" + "---|" * len(archs)]
    saved = {arch: [gains(s) for s in all_sizes if s.arch == arch] for arch in archs}
    names = dict.fromkeys(name for found in saved.values() for gain in found for name in gain)
    mean = {name: [sum(g.get(name, 0.0) for g in found) / len(found) for found in saved.values()] for name in names}
    for name, ms in sorted(mean.items(), key=lambda item: -max(item[1])):
        lines.append(f"| {name} | {' | '.join(f'{m:.2f}' if m else '–' for m in ms)} |")
    return "\n".join(lines)


def main() -> None:
    args = _arguments()
    sizes = [Sizes(*each, args.batch, args.k) for each in itertools.product(args.arch, args.d_in, args.d_sae)]
    print(summary(sizes) if args.summary else "\n".join(map(table, sizes)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    integers = lambda text: [int(word) for word in text.split(",")]  # noqa: E731
    parser.add_argument("--arch", type=lambda text: text.split(","), default=["topk", "relu", "jumprelu"])
    parser.add_argument("--d-in", type=integers, default=[768, 2304], metavar="N,N,…")
    parser.add_argument("--d-sae", type=integers, default=[2**14, 2**16], metavar="N,N,…")
    parser.add_argument("--batch", type=int, default=8192)
    parser.add_argument("--k", type=int, default=50)
    parser.add_argument("--summary", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
