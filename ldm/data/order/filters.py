"""Filters: an expression over a manifest's numeric columns that says which samples are used.

    AESTHETIC_SCORE > 5.0 and 512 <= width and height >= 512 and not pwatermark >= 0.5 and has(punsafe)

Comparisons (also chained), `and`, `or`, `not`, `+ - * /`, numbers, columns, parentheses and `has(column)`. Nothing is
evaluated as Python: the text is parsed by its grammar, and anything else is refused with its place.

Column names are compared without case and with all but letters and digits as `_`; where no column has the name,
aesthetic, aesthetic_score and score mean the same, punsafe and unsafe, pwatermark and watermark. A comparison
with a value that a sample does not have is false, whatever the operator, so `not x > 5` keeps samples without x and
`x <= 5` does not.
"""

import ast
import operator
import re
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ldm.data.shards.index import Manifest
from ldm.errors import UserError, nearest

Numbers = NDArray[np.float64]
Mask = NDArray[np.bool_]
Lookup = Callable[[str], Numbers]

CHUNK = 1 << 20
MAX_characters = 10_000
MAX_depth = 100
SAME = ({"aesthetic", "aesthetic_score", "score"}, {"punsafe", "unsafe"}, {"pwatermark", "watermark"})

_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_COMPUTE: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


class RuleCount(NamedTuple):
    """A rule, and how many samples it kept and dropped of those that passed the rules before it."""

    rule: str
    kept: int
    dropped: int


class Filter:
    """A parsed expression. Its top-level `and` terms are its rules, in order.

    Raises UserError, which shows the place, for anything outside the grammar.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        if len(text) > MAX_characters:
            raise UserError(f"a filter has at most {MAX_characters} characters, this one {len(text)}")
        try:
            tree = ast.parse(text.strip(), mode="eval").body
        except SyntaxError as error:
            raise self._error(error.msg, (error.offset or len(text.strip()) + 1) - 1) from error
        except (RecursionError, MemoryError, ValueError) as error:
            raise UserError(f"the filter {text[:80]!r} cannot be read: {error}") from error
        rules = tree.values if isinstance(tree, ast.BoolOp) and isinstance(tree.op, ast.And) else [tree]
        for rule in rules:
            self._check(rule, truth=True)
        self._rules = [(ast.get_source_segment(text.strip(), rule) or text, rule) for rule in rules]
        self.names = sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - {"has"})

    def resolve(self, manifest: Manifest) -> dict[str, str]:
        """The manifest's column of each name. Raises UserError, with the nearest names, for an unknown name."""
        spelled: dict[str, list[str]] = {}
        for column in manifest.columns:
            spelled.setdefault(_plain(column), []).append(column)
        resolved = {}
        for name in self.names:
            plain = _plain(name)
            others = next((group for group in SAME if plain in group), {plain})
            columns = spelled.get(plain) or [c for other in sorted(others) for c in spelled.get(other, [])]
            if not columns:
                place = re.search(rf"\b{re.escape(name)}\b", self.text.strip())
                hint = f"no sample has this number; {nearest(plain, spelled)}"
                raise self._error(hint, place.start() if place else 0)
            if name in columns or len(columns) == 1:
                resolved[name] = name if name in columns else columns[0]
            else:
                raise UserError(f"filter: {name} may be {' or '.join(columns)}; write one of them as it is")
        return resolved

    def masks(self, manifest: Manifest, columns: dict[str, str], start: int, stop: int) -> list[Mask]:
        """For each rule, which of the samples start to stop fulfil it; `columns` is the result of `resolve`."""
        read = {name: np.asarray(manifest.column(column)[start:stop]) for name, column in columns.items()}
        with np.errstate(all="ignore"):
            return [np.broadcast_to(_truth(rule, read), stop - start) for _, rule in self._rules]

    @property
    def rules(self) -> list[str]:
        """The top-level `and` terms as they are written."""
        return [text for text, _ in self._rules]

    def _error(self, why: str, place: int) -> UserError:
        return UserError(
            f"filter: {why}\n  {self.text.strip()}\n  {' ' * place}^\n"
            "a filter compares columns and numbers by < <= > >= == !=, joined by and, or, not; + - * / ( ) has(column)"
        )

    def _check(self, node: ast.expr, truth: bool, depth: int = 0) -> None:
        """Raises UserError unless the node is of the grammar and a truth value, or a number, as wanted."""
        if depth > MAX_depth:
            raise self._error(f"this is nested more than {MAX_depth} times", node.col_offset)
        match node:
            case ast.BoolOp(values=values) if truth:
                parts, inner = values, True
            case ast.UnaryOp(op=ast.Not(), operand=operand) if truth:
                parts, inner = [operand], True
            case ast.Compare(left=left, ops=ops, comparators=others) if truth and all(type(o) in _COMPARE for o in ops):
                parts, inner = [left, *others], False
            case ast.Call(func=ast.Name(id="has"), args=[ast.Name()], keywords=[]) if truth:
                return
            case ast.BinOp(left=left, op=op, right=right) if not truth and type(op) in _COMPUTE:
                parts, inner = [left, right], False
            case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=operand) if not truth:
                parts, inner = [operand], False
            case ast.Name(id=name) if not truth and name != "has":
                return
            case ast.Constant(value=int() | float() as value) if not truth and not isinstance(value, bool):
                return
            case _:
                expected = "a comparison is expected here" if truth else "a number or a column is expected here"
                raise self._error(expected, node.col_offset)
        for part in parts:
            self._check(part, inner, depth + 1)


def _plain(name: str) -> str:
    return re.sub(r"[^0-9a-z]+", "_", name.lower()).strip("_")


def _truth(node: ast.expr, read: dict[str, Numbers]) -> Any:
    """Whether an expression of the grammar is true, for each sample; a scalar where no column is in it."""
    match node:
        case ast.BoolOp(op=op, values=values):
            join = np.logical_and if isinstance(op, ast.And) else np.logical_or
            return reduce(join, (_truth(part, read) for part in values))
        case ast.UnaryOp(operand=operand):
            return np.logical_not(_truth(operand, read))
        case ast.Call(args=[ast.Name(id=name)]):
            return ~np.isnan(read[name])
        case ast.Compare(left=left, ops=ops, comparators=others):
            numbers = [_number(part, read) for part in (left, *others)]
            holds: Any = True
            for compare, a, b in zip(ops, numbers, numbers[1:], strict=False):
                holds = holds & ~np.isnan(a) & ~np.isnan(b) & _COMPARE[type(compare)](a, b)
            return holds
    raise AssertionError(ast.dump(node))


def _number(node: ast.expr, read: dict[str, Numbers]) -> Any:
    """The value of an expression of the grammar for each sample; NaN where a column is absent."""
    match node:
        case ast.BinOp(left=left, op=op, right=right):
            return _COMPUTE[type(op)](_number(left, read), _number(right, read))
        case ast.UnaryOp(op=op, operand=operand):
            value = _number(operand, read)
            return -value if isinstance(op, ast.USub) else value
        case ast.Name(id=name):
            return read[name]
        case ast.Constant(value=int() | float() as value):
            return np.float64(value)
    raise AssertionError(ast.dump(node))


def count_rules(rules: Sequence[str], passed: Sequence[int]) -> list[RuleCount]:
    """The counts of rules; `passed` are the samples before the first and after each."""
    return [RuleCount(rule, passed[i + 1], passed[i] - passed[i + 1]) for i, rule in enumerate(rules)]
