"""A generator is made from (seed, purpose, round, client, epoch) wherever one is needed; no global
generator is used or moved.
"""

import hashlib

import torch


def generator(
    seed: int, purpose: str, round: int = 0, client: int = 0, epoch: int = 0
) -> torch.Generator:
    """A CPU generator that depends on its arguments alone, so that nothing depends on the order in
    which things are drawn.

    Args:
        seed: the run's seed.
        purpose: what is drawn, for example "batches"; different purposes never share numbers.
        round, client, epoch: where in the run; 0 where a purpose has none.
    """
    digest = hashlib.sha256(f"{seed}/{purpose}/{round}/{client}/{epoch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
