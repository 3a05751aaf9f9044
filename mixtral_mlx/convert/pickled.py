"""A torch pickle → descriptions of the tensors in it, without unpickling anything.

A pickle is a program. Here its operations are walked one by one, with stand-ins that only describe: nothing it names is
imported or called, and whatever a file of tensors does not need is refused by name."""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import Any, NoReturn

from ..config import shown
from .names import ConvertError

_MAX_OPERATIONS = 500_000  # A tensor takes about 40; 8x22B has 1,700, and 6,000 where it is packed.
_MAX_ITEMS = 1 << 48
_STORAGES = {
    **{"FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16", "DoubleStorage": "float64"},
    **{"LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8"},
    **{"ByteStorage": "uint8", "BoolStorage": "bool"},
}
_ITEM_BYTES = {
    **{"float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "int16": 2},
    **{"int8": 1, "uint8": 1, "bool": 1},
}
_UNTYPED = "torch.storage UntypedStorage"
_REBUILDERS = {
    "collections OrderedDict": "_ordered_dict",
    "torch._utils _rebuild_tensor_v2": "_tensor",
    "torch._utils _rebuild_tensor_v3": "_typed_tensor",
    "torch._utils _rebuild_parameter": "_parameter",
}
_HINT = "Weights need no code. Take a safetensors version of the model, or a copy from a source you trust."


@dataclass(frozen=True)
class Storage:
    """`count` items that the pickle refers to by `key`: of `dtype`, or bytes where each tensor says its own."""

    key: str
    dtype: str | None
    count: int

    @property
    def nbytes(self) -> int:
        return self.count * (_ITEM_BYTES[self.dtype] if self.dtype else 1)


@dataclass(frozen=True)
class View:
    """A tensor: `shape` and `strides` over the items of a storage, from item `offset`."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def item_bytes(self) -> int:
        return _ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class _Name:
    """Something the pickle would import, as "module name"."""

    name: str


class _Mark:
    """Where on the stack a run of items begins."""


def describe(stream: BytesIO) -> Any:
    """What the pickle at the front of `stream` makes: Python's plain values, with a `View` for each tensor.

    Raises `ConvertError`: "unsafe_pickle" for what is more than data, "bad_torch_file" for what is no pickle."""
    machine = _Machine()
    try:
        for count, (operation, argument, _) in enumerate(pickletools.genops(stream)):
            if count == _MAX_OPERATIONS:
                refuse(f"has more than {_MAX_OPERATIONS:,} operations, more than any Mixtral's")
            if operation.name == "STOP":
                break
            step = _STEPS.get(operation.name)
            if step is None:
                refuse(f"uses the operation {operation.name}, which no file of tensors needs")
            step(machine, argument)
    except (ValueError, OverflowError) as error:
        damaged(f"is cut short or damaged ({str(error)[:100]!r})")
    return machine.pop()


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack or isinstance(self.stack[-1], _Mark):
            damaged("takes from an empty stack")
        return self.stack.pop()

    def last(self, count: int) -> tuple[Any, ...]:
        return tuple([self.pop() for _ in range(count)][::-1])

    def since_mark(self) -> list[Any]:
        items: list[Any] = []
        while self.stack and not isinstance(self.stack[-1], _Mark):
            items.append(self.stack.pop())
        if not self.stack:
            damaged("lacks a mark")
        self.stack.pop()
        return items[::-1]

    def remember(self, place: int) -> None:
        value = self.pop()
        self.memo[place] = value
        self.push(value)

    def recall(self, place: int) -> None:
        if place not in self.memo:
            damaged("recalls what it has not stored")
        self.push(self.memo[place])

    def append(self, values: list[Any]) -> None:
        target = self.pop()
        if type(target) is not list:
            damaged("appends to something that is no list")
        target += values
        self.push(target)

    def set_items(self, values: list[Any]) -> None:
        target = self.pop()
        if type(target) is not dict or len(values) % 2:
            damaged("sets items of something that is no dictionary")
        for key, value in zip(values[::2], values[1::2], strict=True):
            # No numbers, whose hashes can be made to collide, and no tuples, hashed however deep they are.
            if type(key) is not str:
                refuse(f"has a dictionary with a key of type {type(key).__name__.strip('_')}")
            target[key] = value
        self.push(target)

    def name(self, name: str) -> None:
        module, _, attribute = name.partition(" ")
        known = name in _REBUILDERS or name == _UNTYPED
        known |= module == "torch" and (attribute in _STORAGES or attribute in _ITEM_BYTES)
        if not known:
            refuse(f"asks for {shown(f'{module}.{attribute}')}, which no file of tensors needs")
        self.push(_Name(name))

    def name_from_stack(self) -> None:
        module, attribute = self.last(2)
        if type(module) is not str or type(attribute) is not str:
            damaged("names something with no text")
        self.name(f"{module} {attribute}")

    def reduce(self) -> None:
        function, arguments = self.last(2)
        method = _REBUILDERS.get(function.name) if isinstance(function, _Name) else None
        if method is None or type(arguments) is not tuple:
            refuse("calls something that is no function for rebuilding tensors")
        self.push(getattr(self, method)(arguments))

    def build(self) -> None:
        # State dictionaries carry a `_metadata` attribute, which says nothing about the weights.
        target, state = self.last(2)
        if type(target) is not dict or type(state) is not dict:
            refuse("sets attributes of something that is no dictionary")
        self.push(target)

    def storage(self) -> None:
        parts = self.pop()
        known = type(parts) is tuple and len(parts) in (5, 6) and parts[0] == "storage"
        if not known or parts[5:] not in ((), (None,)):
            refuse("refers to something outside it that is no storage")
        _, kind, key, location, count = parts[:5]
        if not isinstance(kind, _Name) or type(key) is not str or type(location) is not str or not _is_count(count):
            damaged("refers to a storage in no known form")
        dtype = None if kind.name == _UNTYPED else _STORAGES.get(kind.name.removeprefix("torch "))
        if dtype is None and kind.name != _UNTYPED:
            damaged("refers to a storage in no known form")
        self.push(Storage(key, dtype, count))

    def _ordered_dict(self, arguments: tuple[Any, ...]) -> dict[Any, Any]:
        if arguments:
            refuse("makes a dictionary in an unusual way")
        return {}

    def _tensor(self, arguments: tuple[Any, ...]) -> View:
        if len(arguments) not in (6, 7) or not isinstance(arguments[0], Storage) or arguments[0].dtype is None:
            damaged("rebuilds a tensor in no known form")
        return _view(arguments[0], arguments[0].dtype, *arguments[1:4])

    def _typed_tensor(self, arguments: tuple[Any, ...]) -> View:
        if len(arguments) not in (7, 8) or not isinstance(arguments[0], Storage) or not isinstance(arguments[6], _Name):
            damaged("rebuilds a tensor in no known form")
        dtype = arguments[6].name.removeprefix("torch ")
        if dtype not in _ITEM_BYTES:
            damaged("rebuilds a tensor in no known form")
        return _view(arguments[0], dtype, *arguments[1:4])

    def _parameter(self, arguments: tuple[Any, ...]) -> View:
        if not arguments or not isinstance(arguments[0], View):
            damaged("makes a parameter of something that is no tensor")
        return arguments[0]


def _view(storage: Storage, dtype: str, offset: Any, shape: Any, strides: Any) -> View:
    if not _are_counts(shape) or not _are_counts(strides) or len(shape) != len(strides) or not _is_count(offset):
        damaged("rebuilds a tensor of impossible shape")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if all(shape) and (last + 1) * _ITEM_BYTES[dtype] > storage.nbytes:
        damaged("rebuilds a tensor that reaches beyond its storage")
    return View(storage, dtype, offset, shape, strides)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MAX_ITEMS


def _are_counts(value: Any) -> bool:
    return type(value) is tuple and len(value) <= 8 and all(map(_is_count, value))


_Step = Callable[[_Machine, Any], None]
_STEPS: dict[str, _Step] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda machine, argument: None),
    **dict.fromkeys(
        ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
        _Machine.push,
    ),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "MARK": lambda machine, _: machine.push(_Mark()),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.since_mark())),
    "TUPLE1": lambda machine, _: machine.push(machine.last(1)),
    "TUPLE2": lambda machine, _: machine.push(machine.last(2)),
    "TUPLE3": lambda machine, _: machine.push(machine.last(3)),
    "APPEND": lambda machine, _: machine.append(list(machine.last(1))),
    "APPENDS": lambda machine, _: machine.append(machine.since_mark()),
    "SETITEM": lambda machine, _: machine.set_items(list(machine.last(2))),
    "SETITEMS": lambda machine, _: machine.set_items(machine.since_mark()),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _Machine.remember),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _Machine.recall),
    "MEMOIZE": lambda machine, _: machine.remember(len(machine.memo)),
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": lambda machine, _: machine.name_from_stack(),
    "REDUCE": lambda machine, _: machine.reduce(),
    "BUILD": lambda machine, _: machine.build(),
    "BINPERSID": lambda machine, _: machine.storage(),
}


def refuse(what: str) -> NoReturn:
    raise ConvertError(f"The pickle {what}.", code="unsafe_pickle", hint=_HINT)


def damaged(what: str) -> NoReturn:
    raise ConvertError(f"The pickle {what}.", code="bad_torch_file", hint="Fetch the file again.")
