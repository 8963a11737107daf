"""Hardware by name and by numbers, and what is said of mistakes."""

from __future__ import annotations

import pytest

from pikv_core.errors import UsageError
from pikv_core.simulation.cost.hardware import Hardware, built_in


def test_names_and_numbers() -> None:
    assert Hardware.load("H100").flops_per_s == pytest.approx(989e12 / 2)
    assert Hardware.load("h100, mfu=0.4,gpus=8").flops_per_s == pytest.approx(989e12 * 0.4 * 8)
    by_text = Hardware.load("peak_tflops=4e2,mfu=0.4")
    assert by_text == Hardware.load({"peak_tflops": 400.0, "mfu": 0.4})
    assert by_text.flops_per_s == pytest.approx(160e12)
    assert by_text.hbm_gib is None


def test_every_built_in_device_is_whole() -> None:
    for name in built_in():
        hardware = Hardware.load(name)
        assert None not in (hardware.hbm_gib, hardware.hbm_gb_per_s, hardware.host_link_gb_per_s), name


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("h10", ("'h10'", "did you mean 'h100'")),
        ("", ("known device",)),
        ("mfu=0.4", ("peak_tflops: required",)),
        ("mfu=0.4,h100", ("'h100'",)),
        ("h100,mfu=1.5", ("mfu", "less than or equal to 1", "got 1.5")),
        ("h100,mfu=fast", ("mfu: expected a number", "'fast'")),
        ("peak_tflop=400", ("unknown key; did you mean 'peak_tflops'?", "peak_tflops: required")),
        ("peak_tflops=0", ("greater than 0",)),
        ({"peak_tflops": float("inf")}, ("finite",)),
    ],
)
def test_mistakes_are_told_with_a_hint(spec: object, words: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as caught:
        Hardware.load(spec)  # type: ignore[arg-type]
    assert all(word in caught.value.message for word in words), caught.value.message
    assert caught.value.hint and "h100" in caught.value.hint
