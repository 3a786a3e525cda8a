"""Data loaders from config, annotations and the batch fields of a task."""

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from configs.schema import DataConfig
from datasets.annotations import Annotations, Record
from datasets.collate import Collate
from datasets.image_cache import cached_images
from datasets.images import Images
from datasets.pairs import GalleryImages, QueryCaptions, TrainPairs
from datasets.samplers import IdentityBatches, LocalMicroBatches, RandomBatches
from datasets.shared_memory import require_shared_memory
from datasets.text.learning import learn_merges
from datasets.text.levels import check_levels
from datasets.text.tokenizers import (
    LEARNT,
    ClipTokenizer,
    TextTokenizer,
    build_tokenizer,
    merges_in_place_of,
)
from datasets.transforms import build_transform
from datasets.workers import data_loader, num_workers
from utils.batch import Batch, MicroBatch
from utils.distributed import world_size
from utils.errors import ConfigError
from utils.sharding import local_slice, shard_sizes, split_batch

LEARN_FROM = 10_000  # captions that a vocabulary is learnt from, in about a second
SEPARATE_DRAWS = 2**31  # added to an epoch's number for draws apart from those of all epochs


class TrainLoader:
    """Training batches, epoch after epoch.

    Args:
        pairs: training pairs, which `index` of a batch refers to.
        batches: sampler of the global batches.
        batch_size: pairs in a global batch.
        micro_batches: number of micro-batches that this process splits its shard of a batch into.
        load: sampler of this process's micro-batches -> data loader.
    """

    def __init__(
        self,
        pairs: TrainPairs,
        batches: RandomBatches | IdentityBatches,
        batch_size: int,
        micro_batches: int,
        load: Callable[[Sampler[list[int]]], DataLoader[Batch]],
    ) -> None:
        self.pairs, self.batches, self.batch_size, self.micro_batches = pairs, batches, batch_size, micro_batches
        self.load, self.loader = load, load(LocalMicroBatches(batches, micro_batches))

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, number: int, start: int = 0) -> Iterator[list[MicroBatch]]:
        """The batches of an epoch, each as a list of micro-batches.

        Order, augmentation and masking depend on the seed and the epoch alone.

        Args:
            number: epoch, from 1.
            start: batches to leave out, which an interrupted run has trained on.
        """
        self.batches.set_epoch(number, start)
        self.pairs.set_epoch(number)
        return self._sharded(self.loader, self.batches, start, self.micro_batches)

    def every_pair(self, number: int) -> Iterator[MicroBatch]:
        """Each pair once in random batches, whatever the sampler, drawn apart from the batches of epoch `number`."""
        batches = RandomBatches(len(self.pairs), self.batch_size, self.pairs.seed)
        batches.set_epoch(SEPARATE_DRAWS + number)
        self.pairs.set_epoch(SEPARATE_DRAWS + number)
        for (micro_batch,) in self._sharded(self.load(LocalMicroBatches(batches, 1)), batches, 0, 1):
            yield micro_batch

    def _sharded(
        self, loader: DataLoader[Batch], batches: RandomBatches | IdentityBatches, start: int, micro_batches: int
    ) -> Iterator[list[MicroBatch]]:
        loaded = iter(loader)
        for number in range(start, len(batches)):
            shards = split_batch(batches.size(number), micro_batches, self.pairs.rows_per_pair)
            yield [MicroBatch(next(loaded), shard) for shard in shards]


class EvalLoaders(NamedTuple):
    """Gallery (images) and query (captions) batches of this process's shard of a split."""

    gallery: DataLoader[Batch]
    query: DataLoader[Batch]  # from short to long captions
    places: Tensor  # int64 (n,): place of each caption in `query`, in annotation order
    images: Images  # readers of the gallery, which know the unreadable ones
    records: Sequence[Record]  # the split, on all processes


def build_train_loader(
    config: DataConfig,
    annotations: Annotations,
    tokenizer: TextTokenizer,
    *,
    fields: Collection[str],
    full_text: bool,
    seed: int,
    pin_memory: bool,
    micro_batches: int = 1,
) -> TrainLoader:
    """Training batches that hold exactly `fields`.

    Args:
        config: data settings.
        annotations: the data set.
        tokenizer: captions -> ids.
        fields: batch fields that the task reads, from utils/batch.py.
        full_text: keep all `text_length` columns instead of cutting to the longest caption.
        seed: random seed of order, augmentation and masking.
        pin_memory: page-locked batches, for asynchronous copies to a GPU.
        micro_batches: number of micro-batches per process and batch.

    Raises:
        ConfigError: settings contradict each other or the data set.
    """
    check_levels(config.text_levels)
    if config.word_source == "attributes" and not any(record.attributes for record in annotations.train):
        raise ConfigError(
            f"data.word_source: needs annotations with attributes, but {annotations.folder} has none; use IVT's "
            "cuhk_pedes_att.json in place of reid_raw.json, or set data.word_source=clause"
        )
    transform = build_transform(config, train=True)
    cache = cached_images(config, annotations.train, train=True)
    pairs = TrainPairs(annotations.train, annotations.train_labels, transform, tokenizer, fields, seed, config, cache)
    if config.text_levels == ["sentence"]:
        pairs.caption_ids  # noqa: B018  # encoded before the workers start
    batches = build_batches(config, [pair.record.pid for pair in pairs.pairs], seed)
    workers = num_workers(config)
    per_pair = pairs.rows_per_pair + (config.support_images if "support_images" in fields else 0)
    local_pairs, parts = -(-len(pairs) // world_size()), world_size() * micro_batches
    require_shared_memory(
        config,
        workers=workers,
        images=-(-config.batch_size // parts) * per_pair,
        total=local_pairs * per_pair,
        held=micro_batches,
        depth=transform.depth,
    )

    def load(batches: Sampler[list[int]]) -> DataLoader[Batch]:
        return data_loader(
            pairs,
            batch_sampler=batches,
            workers=workers,
            timeout=config.timeout,
            collate_fn=Collate(fields, full_text=full_text),
            pin_memory=pin_memory,
        )

    return TrainLoader(pairs, batches, config.batch_size, micro_batches, load)


def build_batches(config: DataConfig, pids: list[int], seed: int) -> RandomBatches | IdentityBatches:
    """The sampler of global batches."""
    if config.sampler == "identity":
        return IdentityBatches(pids, config.batch_size, config.num_instances, seed)
    return RandomBatches(len(pids), config.batch_size, seed)


def build_eval_loaders(
    config: DataConfig, records: Sequence[Record], tokenizer: TextTokenizer, *, batch_size: int, pin_memory: bool
) -> EvalLoaders:
    """Gallery and query batches of this process's shard of a split."""
    local = records[local_slice(shard_sizes(len(records)))]
    skip = config.on_bad_image == "skip"
    cache = cached_images(config, records, train=False)
    gallery = GalleryImages(local, build_transform(config, train=False), skip_bad_images=skip, cache=cache)
    captions = QueryCaptions(local, tokenizer)
    return EvalLoaders(
        gallery_loader(config, gallery, batch_size, pin_memory=pin_memory),
        eval_loader(captions, batch_size, pin_memory=pin_memory),
        captions.places,
        gallery.images,
        records,
    )


def gallery_loader(
    config: DataConfig, gallery: GalleryImages, batch_size: int, *, pin_memory: bool = False
) -> DataLoader[Batch]:
    """Batches of images in order; raises `ConfigError` if the workers have too little shared memory for them."""
    workers = num_workers(config)
    require_shared_memory(config, workers=workers, images=batch_size, total=len(gallery))
    return eval_loader(gallery, batch_size, pin_memory=pin_memory, workers=workers, timeout=config.timeout)


def eval_loader(
    dataset: Dataset[Batch], batch_size: int, *, pin_memory: bool = False, workers: int = 0, timeout: float = 0
) -> DataLoader[Batch]:
    """Batches of a data set in order, without random draws; `timeout` is in seconds and needs workers."""
    return data_loader(
        dataset, batch_size=batch_size, workers=workers, timeout=timeout, collate_fn=Collate(), pin_memory=pin_memory
    )


def data_tokenizer(
    config: DataConfig,
    folder: Path,
    *,
    most: int,
    kinds: Collection[str] = ("clip",),
    learn_from: Annotations | None = None,
) -> TextTokenizer:
    """The tokenizer that the config names, or the one in the folder of the training data set.

    Args:
        config: data settings.
        folder: folder of the data set.
        most: vocabulary size of the encoder.
        kinds: kinds of tokenizers that the encoder supports.
        learn_from: training data set, for `data.tokenizer=captions`.

    Raises:
        ConfigError: there is no tokenizer, it is of another kind, or its vocabulary is larger than the encoder's.
    """
    tokenizer: TextTokenizer
    if config.tokenizer == LEARNT and learn_from is not None:
        captions = learn_from.training_captions()
        some = captions[:: max(1, len(captions) // LEARN_FROM)]
        tokenizer = ClipTokenizer(learn_merges(some), config.text_length)
    else:
        tokenizer = build_tokenizer(config.tokenizer or str(folder / "tokenizer"), config.text_length)
    if tokenizer.kind not in kinds:
        raise ConfigError(
            f"data.tokenizer: this encoder needs a {' or '.join(kinds)} tokenizer, "
            f"got {config.tokenizer}, which is {tokenizer.kind}"
        )
    if tokenizer.vocab_size > most:
        raise ConfigError(
            f"data.tokenizer: the text tower has {most} tokens (model.text), got a tokenizer with "
            f"{tokenizer.vocab_size}; use the tokenizer of the model"
        )
    return tokenizer


def text_notes(config: DataConfig, tokenizer: TextTokenizer, records: Sequence[Record], kind: str) -> list[str]:
    """Remarks for the log: where CLIP's merges come from, and how many captions are cut.

    Args:
        config: data settings.
        tokenizer: captions -> ids.
        records: records of a split.
        kind: word for its captions, such as training.
    """
    notes = []
    if config.tokenizer is not None and (copy := merges_in_place_of(config.tokenizer)):
        notes.append(f"data.tokenizer: {config.tokenizer} is not in the hub's cache; its merges are read from {copy}")
    lengths = [tokenizer.length(caption) for record in records for caption in record.captions]
    cut = sum(length > config.text_length for length in lengths)
    if cut:
        notes.append(
            f"data.text_length: {cut} of {len(lengths)} {kind} captions are longer than {config.text_length} tokens "
            f"and are cut; the longest has {max(lengths)}"
        )
    return notes
