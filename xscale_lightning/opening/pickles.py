"""What a pickle of torch's would make, found out without making any of it.

`torch.load(weights_only=True)` runs nothing but a list of functions that rebuild tensors, yet it believes what a file
says of sizes. This reader follows a pickle's instructions with stand-ins: it imports nothing, calls nothing, and
compares every tensor with the storage it is cut from.
"""

import io
import math
import pickletools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, cast

import torch

from xscale_lightning.opening.values import (
    LITERALS,
    TUPLES,
    VALUES,
    Claimed,
    Global,
    Made,
    Refused,
    as_dict,
    as_list,
    flat_set,
    pair,
    pairs,
    popped,
    whole_number,
)

MAX_LENGTH = 256_000_000  # bytes of a pickle; the weights are not in it
MAX_STEPS = 2_000_000  # instructions; a checkpoint has some fifty for a tensor


# Bytes per number of every typed storage that plain tensors have.
STORAGES = {
    **{f"torch.{name}Storage": 1 for name in ("Char", "Byte", "Bool")},
    **{f"torch.{name}Storage": 2 for name in ("Half", "BFloat16", "Short")},
    **{f"torch.{name}Storage": 4 for name in ("Float", "Int")},
    **{f"torch.{name}Storage": 8 for name in ("Double", "Long", "ComplexFloat")},
    **{"torch.ComplexDoubleStorage": 16, "torch.storage.UntypedStorage": 1, "torch.UntypedStorage": 1},
}
DTYPES = {f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
TENSORS = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v3")
PARAMETERS = ("torch._utils._rebuild_parameter", "torch.nn.parameter.Parameter")
PLAIN = ("collections.OrderedDict", "torch.Size", "torch.device", "_codecs.encode", "builtins.set", "__builtin__.set")
NAMED = {*STORAGES, *DTYPES, *TENSORS, *PARAMETERS, *PLAIN}


class Reader:
    """Follows the instructions of one pickle.

    Args:
        storage_bytes: size of a stored record by its key; of an unknown one it raises `KeyError`. None in old files,
            whose storages come after the pickle: `claims` has what is claimed of each.
        also: further classes by their full names, such as `argparse.Namespace`, whose objects hold plain values.
    """

    def __init__(self, storage_bytes: Callable[[str], int] | None, also: tuple[str, ...] = ()) -> None:
        self.storage_bytes, self.also = storage_bytes, also
        self.claims: dict[str, Claimed] = {}
        self.total = 0  # bytes of all tensors, each counted as often as it is there

    def read(self, content: io.BytesIO) -> Any:
        """The value of the next pickle in `content`, with stand-ins for tensors.

        Raises:
            Refused: it is damaged, or asks for anything else than weights and plain values.
        """
        stack: list[Any] = []
        marks: list[int] = []
        memo: dict[int, Any] = {}
        steps = 0
        try:
            for opcode, given, _ in pickletools.genops(content):
                steps += 1
                if steps > MAX_STEPS:
                    raise Refused("its pickle has more instructions than that of any model")
                name, argument = opcode.name, cast(Any, given)
                if name == "STOP":
                    return stack.pop()
                if name == "MARK":
                    marks.append(len(stack))
                elif name in LITERALS:
                    stack.append(LITERALS[name]())
                elif name in VALUES:
                    stack.append(argument)
                elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
                    if argument > steps:
                        raise Refused("its pickle is damaged")
                    memo[argument] = stack[-1]
                elif name == "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                elif name in ("BINGET", "LONG_BINGET", "GET"):
                    stack.append(memo[argument])
                elif name in ("PROTO", "FRAME"):
                    continue
                else:
                    self._act(name, argument, stack, marks)
        except Refused:
            raise
        except Exception as error:  # whatever a damaged stream makes of a stack: it is read no further
            raise Refused("its pickle is damaged") from error
        raise Refused("its pickle is damaged")

    def _act(self, name: str, argument: Any, stack: list[Any], marks: list[int]) -> None:
        if name in TUPLES:
            count = TUPLES[name]
            parts = stack[len(stack) - count :]
            if len(parts) < count:
                raise Refused("its pickle is damaged")
            del stack[len(stack) - count :]
            stack.append(tuple(parts))
        elif name in ("TUPLE", "LIST", "DICT", "FROZENSET"):
            parts = popped(stack, marks)
            stack.append({"TUPLE": tuple, "LIST": list, "DICT": pairs, "FROZENSET": flat_set}[name](parts))
        elif name in ("APPEND", "APPENDS"):
            parts = [stack.pop()] if name == "APPEND" else popped(stack, marks)
            as_list(stack[-1]).extend(parts)
        elif name in ("SETITEM", "SETITEMS"):
            if name == "SETITEM":
                parts = stack[-2:]
                del stack[-2:]
            else:
                parts = popped(stack, marks)
            as_dict(stack[-1]).update(pairs(parts))
        elif name == "ADDITEMS":
            parts = popped(stack, marks)
            stack[-1].update(flat_set(parts))
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            popped(stack, marks)
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "GLOBAL":
            stack.append(self._named(argument.replace(" ", ".", 1)))
        elif name == "STACK_GLOBAL":
            last, module = stack.pop(), stack.pop()
            stack.append(self._named(f"{module}.{last}"))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, what = stack.pop(), stack.pop()
            if not isinstance(what, Global) or not isinstance(arguments, tuple):
                raise Refused("it calls what is no function", code=True)
            stack.append(self._call(what.name, arguments))
        elif name == "BUILD":
            state, built = stack.pop(), stack[-1]
            if isinstance(built, Made):
                built.parts.append(state)
            elif not isinstance(built, dict):  # an `OrderedDict`, which may have attributes
                raise Refused("it changes what is no object of torch's", code=True)
            elif any(not isinstance(key, str) or hasattr(OrderedDict, key) for key in as_dict(state)):
                raise Refused("it replaces the methods of a dictionary", code=True)
        elif name == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        else:
            raise Refused(f"its pickle has the instruction {name}", code=True)

    def _named(self, name: str) -> Global:
        if name not in NAMED and name not in self.also:
            raise Refused(f"it asks for {name[:100]!r}", code=True)
        return Global(name)

    def _call(self, name: str, arguments: tuple[Any, ...]) -> Any:
        if name in TENSORS:
            return self._tensor(arguments[6] if name.endswith("_v3") else None, *arguments[:4])
        if name in PARAMETERS:
            if not isinstance(arguments[0], Claimed):
                raise Refused("it makes a parameter of what is no tensor", code=True)
            return arguments[0]
        if name == "collections.OrderedDict":
            given = as_list(arguments[0]) if arguments else []
            return pairs([part for two in given for part in pair(two)])
        if name == "torch.Size":
            return tuple(whole_number(part) for part in arguments[0])
        if name == "_codecs.encode":
            text, encoding = arguments
            if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
                raise Refused("it encodes what is no text", code=True)
            return text.encode("latin1")
        if name.endswith(".set"):
            return flat_set(arguments[0] if arguments else [])
        if name in self.also or name == "torch.device":
            return Made(name, list(arguments))
        raise Refused(f"it calls {name!r}", code=True)

    def _storage(self, record: Any) -> Claimed:
        if not isinstance(record, tuple) or len(record) < 5 or record[0] != "storage":
            raise Refused("it refers to something that is no storage", code=True)
        _, kind, key, location, numbers = record[:5]
        if not isinstance(kind, Global) or kind.name not in STORAGES or not isinstance(key, str):
            raise Refused("it refers to a storage of an unknown kind", code=True)
        if not isinstance(location, str) or any(part is not None for part in record[5:]):
            raise Refused("it refers to a storage in a way that is not read")
        claimed = Claimed(whole_number(numbers), STORAGES[kind.name])
        if self.claims.setdefault(key, claimed) != claimed:  # torch makes it once, as it was claimed first
            raise Refused(f"it claims two sizes of storage {key[:40]!r}")
        if self.storage_bytes is None:
            return claimed
        try:
            there = self.storage_bytes(key)
        except KeyError:
            raise Refused(f"storage {key[:40]!r} is missing") from None
        if claimed.numbers * claimed.item > there:
            raise Refused(f"storage {key[:40]!r} claims {claimed.numbers} numbers, and {there} bytes are there")
        return claimed

    def _tensor(self, dtype: Any, storage: Any, offset: Any, size: Any, stride: Any) -> Claimed:
        if not isinstance(storage, Claimed) or not isinstance(size, tuple) or not isinstance(stride, tuple):
            raise Refused("it makes a tensor of what is no storage", code=True)
        item = DTYPES[dtype.name].itemsize if isinstance(dtype, Global) else storage.item
        there = storage.numbers * storage.item // item
        offset = whole_number(offset)
        sizes, strides = [whole_number(n) for n in size], [whole_number(n) for n in stride]
        if len(sizes) != len(strides) or len(sizes) > 64:
            raise Refused(f"a tensor has {len(sizes)} dimensions and {len(strides)} strides")
        numbers = math.prod(sizes)
        last = offset + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True)) if numbers else -1
        if last >= there or numbers > there:
            shape = str(sizes)[:60]
            raise Refused(f"a tensor of shape {shape} is cut from a storage of {there} numbers")
        self.total += numbers * item
        return Claimed(numbers, item)
