"""The four outcomes of a true positive, whose shares add up to 1 over a label, in the order of their numbers.

- recalled: a main latent fires
- carried: main latents are silent and one other latent carries the word, which is absorption
- below: absorbers fire, none carries enough
- nobody: no absorber fires
"""

OUTCOMES = ("recalled", "carried", "below", "nobody")
