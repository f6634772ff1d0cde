"""The test transform of a run as JSON, for model.json and exported files."""

from typing import Any

from torchvision import transforms as T
from torchvision.transforms import InterpolationMode

STEPS = {kind.__name__: kind for kind in (T.Resize, T.CenterCrop, T.ToTensor, T.Normalize)}
ARGUMENTS = {"Resize": ("size", "interpolation"), "CenterCrop": ("size",), "Normalize": ("mean", "std")}


def describe_transform(transform: Any) -> list[dict[str, Any]]:
    """An evaluation transform of STEPS as JSON."""
    steps: list[dict[str, Any]] = []
    for step in transform.transforms:
        name = type(step).__name__
        if name not in STEPS:
            raise TypeError(f"a test transform has {name}: add it to STEPS")
        values = {argument: getattr(step, argument) for argument in ARGUMENTS.get(name, ())}
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
        if "interpolation" in values:
            values["interpolation"] = values["interpolation"].value
        steps.append({"name": name, **values})
    return steps


def restore_transform(steps: list[dict[str, Any]]) -> T.Compose:
    """The transform that `describe_transform` described."""
    restored = []
    for step in steps:
        arguments = {key: value for key, value in step.items() if key != "name"}
        if "interpolation" in arguments:
            arguments["interpolation"] = InterpolationMode(arguments["interpolation"])
        restored.append(STEPS[step["name"]](**arguments))
    return T.Compose(restored)
