"""Data for the trainer: a function from (batch number, batch size) to a batch, so a run resumes by number."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmkernels.errors import DataError

Batch = Mapping[str, Tensor]
BatchSource = Callable[[int, int], Batch]


def dataset_source(
    dataset: Sequence[Any], collate: Callable[[list[Any]], Batch] | None = None, *, seed: int = 0
) -> BatchSource:
    """Batches of a map-style data set, shuffled anew each epoch by the seed; any batch is found without reading others.

    Args:
        dataset: has a length and gives sample i.
        collate: makes a batch of a list of samples; None = torch's default collation.
        seed: decides the order of every epoch.

    Raises:
        DataError: the data set is empty.
    """
    if len(dataset) == 0:
        raise DataError("dataset_source: dataset must hold samples; got an empty one. Check the path or the filter.")
    join = collate if collate is not None else torch.utils.data.default_collate
    order: dict[int, Tensor] = {}

    def sample(number: int) -> Any:
        epoch, offset = divmod(number, len(dataset))
        if epoch not in order:
            order.clear()  # one epoch's order at a time
            generator = torch.Generator().manual_seed(seed + epoch)
            order[epoch] = torch.randperm(len(dataset), generator=generator)
        return dataset[int(order[epoch][offset])]

    return lambda index, size: join([sample(index * size + i) for i in range(size)])


def iterable_source(batches: Iterable[Batch]) -> BatchSource:
    """Batches of any iterable of dicts (a DataLoader, a list, a streaming set), restarted when it ends.

    Batch number i is the i-th item, so resuming reads and drops the items before it; the iterable must give the same
    items in the same order each time (fix the DataLoader's generator).  Where samples have
    numbers, prefer `dataset_source`.

    Raises:
        DataError: the iterable gives nothing.
    """
    iterator: Iterator[Batch] | None = None
    position = 0

    def fetch(index: int, size: int) -> Batch:
        nonlocal iterator, position
        if iterator is None or index < position:
            iterator, position = iter(batches), 0
        while True:
            item = next(iterator, None)
            if item is None:
                iterator = iter(batches)
                item = next(iterator, None)
                if item is None:
                    raise DataError(
                        "iterable_source: batches must give items each time it is iterated; got none. "
                        "Pass a list or a DataLoader, not a generator that ends."
                    )
            position += 1
            if position == index + 1:
                return item

    return fetch


def check_batch(batch: Batch, size: int, max_length: int | None) -> None:
    """Refuses a batch that would change what the recipe says.

    Raises:
        DataError: another number of samples, or sequences longer than the recipe allows.
    """
    tokens = batch.get("input_ids", batch.get("inputs_embeds"))
    if tokens is None:
        raise DataError(f"check_batch: batch must hold input_ids or inputs_embeds; got {sorted(batch)}. Fix the data.")
    if tokens.shape[0] != size:
        raise DataError(
            f"check_batch: batch must hold micro_batch = {size} samples; got {tokens.shape[0]}. "
            "Give the data the recipe's batch size, and drop a short last batch."
        )
    if max_length is not None and tokens.shape[1] > max_length:
        raise DataError(
            f"check_batch: sequences must have at most max_length = {max_length} tokens; got {tokens.shape[1]}. "
            "Leave longer samples out of the data, or raise max_length in the recipe."
        )
