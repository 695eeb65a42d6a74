"""How often pictures of the shapes data set show what their captions say."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.evaluation.interval import wilson
from ldm.evaluation.metric import Batch, Metric
from ldm.evaluation.protocol import Value
from ldm.examples.shapes import RELATIONS, Combination, Pair, Single, parse
from ldm.examples.shapes_reader import Seen, read

ATTRIBUTES = ("colour", "shape", "size", "position", "binding", "relation", "all")


def _single(what: Single, seen: Sequence[Seen]) -> dict[str, bool]:
    names = ("colour", "shape", "size", "position")
    alone = len(seen) == 1
    agreed = {name: alone and getattr(seen[0], name) == getattr(what, name) for name in names}
    return agreed | {"all": all(agreed.values())}


def _stands(relation: str, first: Seen, second: Seen) -> bool:
    """Whether `first` stands in a relation to `second`, within 30 degrees of the relation's axis."""
    direction_x, direction_y = RELATIONS[relation]
    dx, dy = first.x - second.x, first.y - second.y
    along, across = dx * direction_x + dy * direction_y, abs(dx * direction_y) + abs(dy * direction_x)
    return along > 3**0.5 * across


def _pair(what: Pair, seen: Sequence[Seen]) -> dict[str, bool]:
    named = {what.colour: what.shape, what.other_colour: what.other_shape}
    painted = {thing.colour: thing for thing in seen}
    colour = len(seen) == 2 and set(painted) == set(named)
    agreed = {
        "colour": colour,
        "shape": len(seen) == 2 and sorted(named.values()) == sorted(str(thing.shape) for thing in seen),
        "binding": colour and all(painted[name].shape == shape for name, shape in named.items()),
        "relation": colour and _stands(what.relation, painted[what.colour], painted[what.other_colour]),
    }
    return agreed | {"all": agreed["binding"] and agreed["relation"]}


def agreement(what: Combination, seen: Sequence[Seen]) -> dict[str, bool]:
    """Which attributes of a combination a picture shows, by name.

    One object: colour, shape, size, position. Two: colour and shape (the right two, whichever object has
    which), binding (each shape in its own colour), relation (of the two colours). Both: all. A picture with
    another number of objects than the caption shows none of them.
    """
    return _single(what, seen) if isinstance(what, Single) else _pair(what, seen)


class Alignment(Metric):
    """The share of pictures that show each attribute of their captions (`agreement`), and `all` of them.

    The state is a count, so it adds up exactly over batches and processes. An attribute that no caption names has no
    value.
    """

    higher_is_better = True

    shown: Tensor
    named: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("shown", "named"):
            self.add_state(name, torch.zeros(len(ATTRIBUTES), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, batch: Batch) -> None:
        """Add square pictures and captions as `ldm.examples.shapes` writes them; UserError for others."""
        shape = batch.images.shape
        if len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3]:
            raise UserError(f"alignment reads square pictures [B, 3, H, H], not {list(shape)}")
        pictures = batch.images.detach().permute(0, 2, 3, 1).float().cpu().numpy()
        for picture, caption in zip(pictures, batch.captions, strict=True):
            for name, shown in agreement(parse(caption), read(picture)).items():
                index = ATTRIBUTES.index(name)
                self.named[index] += 1
                self.shown[index] += shown

    def compute(self) -> dict[str, Value]:
        counts = zip(ATTRIBUTES, self.shown, self.named, strict=True)
        return {
            name: Value(float(shown / named), *wilson(int(shown), int(named)), unit="share")
            for name, shown, named in counts
            if named > 0
        }

    def descriptions(self) -> Mapping[str, str]:
        return {"alignment": "ldm.examples.shapes_reader"}
