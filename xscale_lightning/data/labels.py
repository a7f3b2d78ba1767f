"""From the values in a mask file to class numbers 0, 1, 2, ..."""

from collections.abc import Collection, Mapping

import numpy as np

from xscale_lightning.errors import UserError

IGNORED = -1
_SHOWN = 12
MOST = 32767  # classes: their numbers have 16 bits


class LabelMap:
    """Turns mask values into class numbers; values to ignore become `IGNORED`, all others are refused."""

    def __init__(self, classes: Mapping[int, int], ignore: Collection[int] = ()) -> None:
        """Remember the values.

        Args:
            classes: class number by value in the file.
            ignore: values of pixels that do not count.
        """
        self.classes, self.ignore = dict(classes), sorted(ignore)
        table = {**self.classes, **dict.fromkeys(self.ignore, IGNORED)}
        self._values = np.array(sorted(table), np.int64)
        self._numbers = np.array([table[value] for value in sorted(table)], np.int16)

    def __call__(self, values: np.ndarray, where: str, valid: np.ndarray | None = None) -> np.ndarray:
        """Class numbers, int16, of an array of mask values.

        Args:
            values: of any shape and numeric type.
            where: file they are from, for messages.
            valid: same shape; values that are not valid and no class are ignored. (Files that declare their first class
                to be "no data" are common: what is a class stays one.)

        Raises:
            UserError: naming the first value that is neither class nor ignored, and `where` it was found.
        """
        place = np.searchsorted(self._values, values).clip(max=len(self._values) - 1)
        unknown = self._values[place] != values
        refused = unknown if valid is None else unknown & valid
        if refused.any():
            found, known = values[refused].flat[0], [str(value) for value in sorted(self.classes)]
            shown = ", ".join(known[:_SHOWN]) + (f", ... ({len(known)} in all)" if len(known) > _SHOWN else "")
            raise UserError(
                f"masks: value {found:g} in {where} is no class (classes: {shown}; ignored: "
                f"{', '.join(map(str, self.ignore)) or 'none'}); give it a class, or name it in data.ignore."
            )
        return np.where(unknown, np.int16(IGNORED), self._numbers[place])


def refusal(error: UserError, where: str) -> str:
    """Why a mask is refused, without the file's name, for messages that name it themselves."""
    return str(error).removeprefix("masks: ").replace(f" in {where}", "")


def settle_classes(
    labels: Mapping[int, int] | None, names: Collection[str] | None, count: int | None, ignore: Collection[int] = ()
) -> tuple[LabelMap, tuple[str, ...]]:
    """How mask values become classes, and the name of every class, from whichever the user gave.

    Args:
        labels: class number by mask value; None takes the values themselves.
        names: names of the classes, in order; None names them after their values.
        count: number of classes.
        ignore: values of pixels that do not count; without `labels` one of them may be a class number, which then has
            no pixels.

    Raises:
        UserError: if nothing says how many classes there are, two answers differ, or a value is class and ignored.
    """
    if labels:
        numbers = sorted(set(labels.values()))
        if numbers != list(range(len(numbers))):
            raise UserError(f"data.labels: classes {numbers} are not possible; number them 0, 1, 2, ... without a gap.")
        both = sorted(set(labels) & set(ignore))
        if both:
            raise UserError(f"data.ignore: {both[0]} is a class in data.labels too; take it out of one of them.")
    given = {
        "labels": len(set(labels.values())) if labels else None,
        "class_names": len(names) if names else None,
        "num_classes": count,
    }
    said = {name: number for name, number in given.items() if number is not None}
    if not said:
        raise UserError("data.num_classes: nothing says how many classes the masks have; give it, or data.class_names.")
    if len(set(said.values())) > 1:
        text = ", ".join(f"data.{name} {number}" for name, number in said.items())
        raise UserError(f"data: the number of classes differs ({text}); make them agree.")
    number = next(iter(said.values()))
    if not 1 <= number <= MOST:
        raise UserError(f"data.num_classes: {number} is not possible; give 1 to {MOST}.")
    table = dict(labels) if labels else {value: value for value in range(number)}
    shown: dict[int, str] = {}
    for value, cls in table.items():
        shown[cls] = f"{shown[cls]}+{value}" if cls in shown else str(value)
    label_map = LabelMap({value: cls for value, cls in table.items() if value not in ignore}, ignore)
    return label_map, tuple(names) if names else tuple(shown[cls] for cls in range(number))
