"""Documents laid end to end in some order, and samples cut from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from fp4pretrain.data.ids import refuse_sample
from fp4pretrain.data.indexed import DatasetIndex

Sample: TypeAlias = dict[str, torch.Tensor]

_PADDING = -1  # megatron-core's: such an id is no token, and nothing is to be predicted there


@dataclass(frozen=True)
class Ends:
    """What the end of a document means to a run.

    Attributes:
        eod: the id that ends a document.
        mask: attention stops there (`data.document_mask`): samples say which document a token is of.
        reset: positions begin again behind it (`data.reset_positions`).
        no_loss: what follows it is not predicted (`data.eod_mask_loss`).
    """

    eod: int
    mask: bool = False
    reset: bool = False
    no_loss: bool = False


class TokenStream:
    """The tokens of documents in a given order, end to end; nothing is read before it is asked for.

    Args:
        index: the dataset.
        order: [documents] numbers of its documents.
        ends: [documents] int64, how many tokens stand before the end of each, in this order.
        id_limit: the model's number of ids; None where any id is taken.
        meaning: what ends of documents mean; None: nothing.
    """

    def __init__(
        self,
        index: DatasetIndex,
        order: NDArray[Any],
        *,
        ends: NDArray[np.int64] | None = None,
        id_limit: int | None = None,
        meaning: Ends | None = None,
    ) -> None:
        self.index = index
        self.order = order
        self._id_limit = id_limit
        self._meaning = meaning
        self.ends = np.cumsum(index.lengths()[order]) if ends is None else ends
        self._tokens = np.memmap(f"{index.prefix}.bin", dtype=index.dtype, mode="r")

    def __len__(self) -> int:
        """Tokens in it."""
        return int(self.ends[-1]) if len(self.ends) else 0

    def sample(self, begin: int, seq_length: int) -> Sample:
        """The sample that begins at a token of the stream; raises LocalError as `read`."""
        text = self.read(begin, begin + seq_length + 1)
        sample = sample_of(text, seq_length, meaning=self._meaning)
        if self.index.prompts is not None and len(text) > 1:
            prompt = torch.from_numpy(self._prompt(begin + 1, begin + len(text)))
            sample["loss_mask"][: len(prompt)].masked_fill_(prompt, 0.0)
        return sample

    def _prompt(self, begin: int, end: int) -> NDArray[np.bool_]:
        """Which of the tokens [begin, end) belong to the prompt of their document."""
        assert self.index.prompts is not None
        places = np.arange(begin, end)
        which = np.searchsorted(self.ends, places, side="right")
        first = np.where(which > 0, self.ends[which - 1], 0)
        return places - first < self.index.prompts[self.order[which]]

    def read(self, begin: int, end: int) -> NDArray[np.int64]:
        """Tokens [begin, end), fewer where the stream ends.

        Raises LocalError for an id that the model has not, naming the document.
        """
        end = min(end, len(self))
        pieces = [np.zeros(0, dtype=np.int64)]
        place = int(np.searchsorted(self.ends, begin, side="right"))
        while begin < end:
            stop = int(self.ends[place])
            document = int(self.order[place])
            last = self.index.offset(document + 1)  # of the file; `stop` is of the stream
            low = last - (stop - begin)
            high = low + min(end, stop) - begin
            piece = self._tokens[low:high].astype(np.int64)
            if self._id_limit is not None:
                refuse_sample(
                    piece,
                    document=document,
                    prefix=str(self.index.prefix),
                    vocab_size=self._id_limit,
                )
            pieces.append(piece)
            begin, place = min(end, stop), place + 1
        return np.concatenate(pieces)


def sample_of(text: NDArray[np.int64], seq_length: int, *, meaning: Ends | None = None) -> Sample:
    """A stretch of up to seq_length + 1 tokens as a sample that predicts each from those before.

    Returns:
        tokens, labels, position_ids int64 [seq_length]; loss_mask fp32 [seq_length], 0 where the text
        has ended and where an id is megatron-core's padding. With ``meaning.mask`` also documents int64
        [seq_length], the number of ends before each token.
    """
    whole = np.full(seq_length + 1, _PADDING, dtype=np.int64)
    whole[: len(text)] = text
    ids = torch.from_numpy(whole)
    known = ids != _PADDING
    sample = {
        "tokens": ids[:-1].clamp(min=0),
        "labels": ids[1:].clamp(min=0),
        "loss_mask": known[1:].float(),
        "position_ids": torch.arange(seq_length),
    }
    if meaning is not None:
        _apply(meaning, ids[:-1] == meaning.eod, sample)
    return sample


def _apply(meaning: Ends, ends: torch.Tensor, sample: Sample) -> None:
    """Change a sample's parts as ``meaning`` says; ``ends`` [seq]: which tokens end a document."""
    documents, positions = document_places(ends)
    if meaning.mask:
        sample["documents"] = documents
    if meaning.reset:
        sample["position_ids"] = positions
    if meaning.no_loss:
        sample["loss_mask"] = sample["loss_mask"].masked_fill(ends, 0.0)


def document_places(ends: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each token the number of its document, and its position in it. A token that ends a document is
    the last of it.

    Args:
        ends: bool [..., seq], which tokens end a document.

    Returns:
        Two int64 [..., seq], both from 0 on; the first document counts from where the sequence begins.
    """
    begins = ends.roll(1, dims=-1)
    begins[..., 0] = False
    places = torch.arange(ends.shape[-1], device=ends.device).expand(ends.shape)
    first = torch.where(begins, places, 0).cummax(dim=-1).values
    return begins.cumsum(dim=-1), places - first
