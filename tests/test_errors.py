"""Bad input: the type of the error, the argument it names, what was given, what was expected, and that nothing ran."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from common import BACKENDS
from torch import Tensor

from lomix_fast import LoMixLoss, MixPlan, available_backends, lomix_loss, map_stats
from lomix_fast.backends import BACKENDS as TABLE
from lomix_fast.backends import _warn_of_fallback

PLAN = MixPlan.create(2)
ADD = MixPlan.create(2, ("add",))


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any backend that starts to work fails the test."""

    def started(*_: object) -> None:
        raise AssertionError("a backend ran before the arguments were checked")

    for name, row in TABLE.items():
        monkeypatch.setitem(TABLE, name, replace(row, forward=started, backward=started))
    with pytest.raises(AssertionError, match="a backend ran"):  # the trap works
        map_stats(good_logits(), good_target(), ADD, impl="eager")


def good_logits() -> list[Tensor]:
    return [torch.randn(2, 3, 4, 4), torch.randn(2, 3, 8, 8)]


def good_target() -> Tensor:
    return torch.randint(3, (2, 8, 8))


def expect(error: type[Exception], words: tuple[str, ...], call: Any, *args: Any, **kwargs: Any) -> None:
    """The call raises exactly this type, and the message holds every word, the argument's name first of all."""
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert type(caught.value) is error and message.startswith(words[0]), message
    for word in (*words, "got", "expected"):
        assert word in message, f"{word!r} is missing in: {message}"


LOGITS = {
    "not a list": (lambda z: torch.stack([z[0], z[0]]), TypeError, ("logits: got Tensor", "list or tuple")),
    "empty list": (lambda z: [], ValueError, ("logits: got an empty list", "at least one")),
    "not tensors": (lambda z: [z[0], [1.0]], TypeError, ("logits[1]: got list", "torch.Tensor")),
    "None": (lambda z: [None, z[1]], TypeError, ("logits[0]: got NoneType",)),
    "integers": (lambda z: [z[0], z[1].long()], TypeError, ("logits[1]", "torch.int64", "torch.float32")),
    "complex": (lambda z: [z[0].cfloat(), z[1]], TypeError, ("logits[0]", "torch.complex64")),
    "sparse": (lambda z: [z[0].to_sparse(), z[1]], TypeError, ("logits[0]", "sparse", "dense")),
    "rank 2": (lambda z: [z[0][:, :, 0, 0], z[1]], ValueError, ("logits[0]", "(2, 3)", "[B, C, *native]")),
    "rank 6": (
        lambda z: [z[0], z[1].view(2, 3, 2, 2, 4, 4)],
        ValueError,
        ("logits[1]", "(2, 3, 2, 2, 4, 4)"),
    ),
    "rank mix": (lambda z: [z[0].flatten(2), z[1]], ValueError, ("logits[1]", "rank 4", "3 as logits[0]")),
    "batch mix": (lambda z: [z[0], z[1][:1]], ValueError, ("logits[1]", "batch size 1", "2 as logits[0]")),
    "class mix": (lambda z: [z[0], z[1][:, :2]], ValueError, ("logits[1]", "classes 2", "3 as logits[0]")),
    "dtype mix": (lambda z: [z[0].half(), z[1]], ValueError, ("logits[1]", "torch.float32", "torch.float16")),
    "device mix": (lambda z: [z[0], z[1].to("meta")], ValueError, ("logits[1]", "meta", "cpu")),
    "no class": (
        lambda z: [z[0][:, :0], z[1][:, :0]],
        ValueError,
        ("logits[0]", "(2, 0, 4, 4)", "one class"),
    ),
    "no pixel": (lambda z: [z[0], z[1][:, :, :0]], ValueError, ("logits[1]", "(2, 3, 0, 8)", "pixel")),
    "too few": (lambda z: z[:1], ValueError, ("logits: got 1 tensors", "2")),
    "too many": (lambda z: [*z, z[1]], ValueError, ("logits: got 3 tensors", "2")),
}
TARGETS = {
    "not a tensor": (lambda y: y.tolist(), TypeError, ("target: got list", "torch.Tensor")),
    "complex": (lambda y: y.cfloat(), TypeError, ("target: got dtype torch.complex64", "integer")),
    "too few axes": (lambda y: y[:, 0], ValueError, ("target: got shape (2, 8)", "[B, *full]", "2 spatial")),
    "two channels of three classes": (
        lambda y: y.unsqueeze(1).expand(2, 2, 8, 8),
        ValueError,
        ("target", "(2, 2, 8, 8)", "1 channel", "or 3"),
    ),
    "too many axes": (lambda y: y.view(2, 1, 8, 8, 1), ValueError, ("target", "(2, 1, 8, 8, 1)")),
    "other batch": (lambda y: y[:1], ValueError, ("target: got batch size 1", "2 as the logits")),
    "other device": (lambda y: y.to("meta"), ValueError, ("target: got device meta", "cpu")),
    "no pixel": (lambda y: y[:, :0], ValueError, ("target: got shape (2, 0, 8)", "pixel")),
}


@pytest.mark.parametrize("name", LOGITS)
def test_logits(name: str, nothing_runs: None) -> None:
    change, error, words = LOGITS[name]
    expect(error, words, map_stats, change(good_logits()), good_target(), ADD)
    if name != "not a list":  # the module takes one tensor for the output of evaluation
        expect(error, words, LoMixLoss(3, 2), change(good_logits()), good_target())


@pytest.mark.parametrize("name", TARGETS)
def test_target(name: str, nothing_runs: None) -> None:
    change, error, words = TARGETS[name]
    expect(error, words, map_stats, good_logits(), change(good_target()), ADD)
    expect(error, words, LoMixLoss(3, 2), good_logits(), change(good_target()))
    expect(error, words, LoMixLoss(3, 2), good_logits()[1], change(good_target()))


LABELS = {
    "too large": (lambda y: y.fill_(3), ("target: got the label 3", "(0, 0, 0)", "[0, 3)")),
    "negative": (
        lambda y: y.index_fill_(1, torch.tensor(5), -1),
        ("target: got the label -1", "(0, 5, 0)", "[0, 3)"),
    ),
    "255 as uint8": (lambda y: y.to(torch.uint8).fill_(255), ("target: got the label 255", "[0, 3)")),
    "fraction": (lambda y: y + 0.5, ("target: got the label", ".5", "whole class numbers", "rounded")),
    "float too large": (lambda y: y.fill_(7).float(), ("target: got the label 7.0", "[0, 3)")),
    "nan": (lambda y: y.float().fill_(torch.nan), ("target: got the label nan", "whole class numbers")),
    "infinite": (lambda y: y.double().fill_(torch.inf), ("target: got the label inf",)),
    "past int64": (lambda y: y.to(torch.uint64).fill_(2**63 + 1), ("target: got the label", "[0, 3)")),
}


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("name", LABELS)
def test_label_values(name: str, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The values are looked at first: no interpolation has started by then."""

    def started(*_: object, **__: object) -> None:
        raise AssertionError("interpolation ran before the labels were checked")

    monkeypatch.setattr(torch.nn.functional, "interpolate", started)
    change, words = LABELS[name]
    expect(ValueError, words, map_stats, good_logits(), change(good_target()), ADD, impl=impl)
    expect(ValueError, words, LoMixLoss(3, 2, impl=impl), good_logits(), change(good_target()))


def good_parameters() -> dict[str, Tensor]:
    shapes = {"cat_weight": (2, 3, 3), "cat_bias": (1, 3), "awf_weight": (2, 3), "awf_bias": (2,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("name", good_parameters())
def test_parameters(name: str, nothing_runs: None) -> None:
    good = good_parameters()[name]
    bad = {
        "missing": (None, ValueError, (f"{name}: got None", str(list(good.shape)), name[:3])),
        "shape": (torch.randn(*good.shape, 2), ValueError, (f"{name}: got shape", str(tuple(good.shape)))),
        "one row less": (good[1:], ValueError, (f"{name}: got shape", str(tuple(good.shape)))),
        "dtype": (good.long(), TypeError, (f"{name}: got torch.int64", "float")),
        "list": (good.tolist(), TypeError, (f"{name}: got list", "float")),
        "device": (good.to("meta"), ValueError, (f"{name}: got device meta", "cpu")),
    }
    for value, error, words in bad.values():
        parameters = good_parameters() | {name: value}
        expect(error, words, map_stats, good_logits(), good_target(), PLAN, **parameters)
        losses = (good_logits(), good_target(), torch.ones(6), PLAN)
        expect(error, words, lomix_loss, *losses, **parameters)
    superfluous = (f"{name}: got a tensor", "None", name[:3])
    expect(ValueError, superfluous, map_stats, good_logits(), good_target(), ADD, **{name: good})


def test_plan_and_weights(nothing_runs: None) -> None:
    expect(TypeError, ("plan: got str", "MixPlan"), map_stats, good_logits(), good_target(), "add")
    arguments = (good_logits(), good_target())
    expect(TypeError, ("plan: got str", "MixPlan"), lomix_loss, *arguments, torch.ones(3), "add")
    expect(ValueError, ("weights: got shape (4,)", "[3]"), lomix_loss, *arguments, torch.ones(4), ADD)
    expect(TypeError, ("weights: got list", "float"), lomix_loss, *arguments, [1.0] * 3, ADD)
    expect(TypeError, ("weights: got torch.int64", "float"), lomix_loss, *arguments, torch.ones(3).long(), ADD)


CREATE = {
    "nine scales": ({"num_scales": 9}, ValueError, ("num_scales: got 9", "at most 8")),
    "eight scales": ({"num_scales": 8}, ValueError, ("num_scales: got 8", "996", "at most 512", "max_subset_size")),
    "no scale": ({"num_scales": 0}, ValueError, ("num_scales: got 0", "at least 1")),
    "negative": ({"num_scales": -2}, ValueError, ("num_scales: got -2",)),
    "float": ({"num_scales": 3.0}, TypeError, ("num_scales: got 3.0", "int")),
    "bool": ({"num_scales": True}, TypeError, ("num_scales: got True", "int")),
    "unknown": ({"num_scales": 3, "operators": ("add", "div")}, ValueError, ("operators", "'div'", "'awf'", "'sub'")),
    "a string": ({"num_scales": 3, "operators": "add"}, TypeError, ("operators: got 'add'", "tuple or list")),
    "twice": ({"num_scales": 3, "operators": ("mul", "mul")}, ValueError, ("operators", "at most once")),
}


@pytest.mark.parametrize("name", CREATE)
def test_creating_a_plan_or_a_loss(name: str) -> None:
    options, error, words = CREATE[name]
    expect(error, words, MixPlan.create, **options)
    expect(error, words, LoMixLoss, 4, **options)


def test_originals() -> None:
    for bad in ((2, 1), (0, 0), (3,), (-1,)):
        expect(ValueError, (f"originals: got {bad}", "[0, 3)"), MixPlan.create, 3, ("add",), bad)
    for arguments in ((3, (), ()), (1, ("add",), ())):
        with pytest.raises(ValueError, match=r"originals and operators: got .* no map .* at least one original"):
            MixPlan.create(*arguments)


@pytest.mark.parametrize("name", ["supervision", "concat", "awf_sharing", "weighting", "order", "mul", "impl"])
@pytest.mark.parametrize("value", ["nonsense", None, "LoMix", ["lomix"]])
def test_unknown_names(name: str, value: object) -> None:
    default = {"supervision": "lomix", "concat": "learned", "awf_sharing": "size", "weighting": "softplus"}
    default |= {"order": "coarse_to_fine", "mul": "logits", "impl": "auto"}
    if (name, value) == ("order", None):  # which stands for the default
        assert LoMixLoss(3, 2, order=None).order == "coarse_to_fine"
        return
    expect(ValueError, (f"{name}: got {value!r}", default[name]), LoMixLoss, 3, 2, **{name: value})


@pytest.mark.parametrize("supervision", ["mutation", "deep_supervision", "last_layer"])
def test_options_that_a_mode_sets_itself(supervision: str) -> None:
    for option, value in (("operators", ("add",)), ("weighting", "fixed")):
        message = rf"^{option}: got {re.escape(repr(value))} with supervision='{supervision}', which sets it itself"
        with pytest.raises(ValueError, match=message):
            LoMixLoss(3, 2, supervision=supervision, **{option: value})


def test_numbers_of_the_loss() -> None:
    for bad, error in (
        (1, ValueError),
        (0, ValueError),
        (-3, ValueError),
        (3.0, TypeError),
        (True, TypeError),
    ):
        expect(error, (f"num_classes: got {bad!r}", "at least 2"), LoMixLoss, bad, 2)
    for name in ("lambda_ce", "lambda_dice", "smooth_nr", "smooth_dr"):
        for bad, error in (
            (-0.1, ValueError),
            (float("nan"), ValueError),
            (float("inf"), ValueError),
            ("1", TypeError),
            (None, TypeError),
            (True, TypeError),
        ):
            expect(error, (f"{name}: got {bad!r}", "number"), LoMixLoss, 3, 2, **{name: bad})
    for supervision in ("lomix", "last_layer"):
        expect(TypeError, ("num_scales: got '2'", "int"), LoMixLoss, 3, "2", supervision=supervision)


def test_channels_that_are_not_num_classes(nothing_runs: None) -> None:
    words = ("logits: got shape (2, 3,", "num_classes=5")
    expect(ValueError, words, LoMixLoss(5, 2), good_logits(), good_target())
    expect(ValueError, words, LoMixLoss(5, 2), good_logits()[1], good_target())


def test_sizes_that_contradict_the_order(nothing_runs: None) -> None:
    coarse_first, fine_first = good_logits(), good_logits()[::-1]
    for order, logits, sizes, remedy in (
        ("coarse_to_fine", fine_first, [(8, 8), (4, 4)], "fine_to_coarse"),
        ("fine_to_coarse", coarse_first, [(4, 4), (8, 8)], "coarse_to_fine"),
    ):
        criterion = LoMixLoss(3, 2, order=order)
        message = f"logits: got native sizes {sizes}, which contradict order='{order}', expected no axis to "
        for call in (criterion, criterion.map_losses):
            with pytest.raises(ValueError, match=re.escape(message) + f".*pass order='{remedy}'"):
                call(logits, good_target())
    one_axis = [torch.randn(2, 3, 4, 4), torch.randn(2, 3, 8, 2)]
    with pytest.raises(ValueError, match=r"logits: got native sizes \[\(4, 4\), \(8, 2\)\].*sort the list by size"):
        LoMixLoss(3, 2)(one_axis, good_target())


@pytest.mark.parametrize(
    "name",
    ["squared_pred", "include_background", "batch", "sigmoid", "jaccard", "ce_per_sample", "weighted_ce", "structure"],
)
def test_flags_must_be_true_or_false(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name}: got 'no', expected True or False"):
        LoMixLoss(3, 2, **{name: "no"})


@pytest.mark.parametrize("originals", [1, "01", (0.0, 1)])
def test_originals_must_be_scale_numbers(originals: object) -> None:
    with pytest.raises(TypeError, match=r"originals: got .*, expected None or a tuple of scale numbers"):
        MixPlan.create(2, originals=originals)  # type: ignore[arg-type]


def test_equal_sizes_contradict_no_order() -> None:
    logits = [torch.randn(1, 3, 4, 4) for _ in range(2)]
    for order in ("coarse_to_fine", "fine_to_coarse"):
        assert LoMixLoss(3, 2, order=order)(logits, torch.randint(3, (1, 4, 4))).isfinite()


def test_criterion_on_another_device(nothing_runs: None) -> None:
    elsewhere = [z.to("meta") for z in good_logits()]
    expect(ValueError, ("logits: got device meta", "cpu", ".to('meta')"), LoMixLoss(3, 2), elsewhere, good_target())


def test_unknown_and_unusable_backends(monkeypatch: pytest.MonkeyPatch, nothing_runs: None) -> None:
    words = ("impl: got 'fast'", "'auto'", "'reference'", "'eager'", "'cpu'", "'cuda'", "'triton'")
    expect(ValueError, words, map_stats, good_logits(), good_target(), ADD, impl="fast")
    monkeypatch.setitem(TABLE, "cpu", replace(TABLE["cpu"], why_not=lambda device: "it was built for another planet"))
    assert available_backends()["cpu"] == "it was built for another planet"
    for call in (
        lambda: map_stats(good_logits(), good_target(), ADD, impl="cpu"),
        lambda: unusable(good_logits()),
    ):
        with pytest.raises(RuntimeError, match=r"impl: got 'cpu'.*it was built for another planet.*impl='auto'"):
            call()


def unusable(logits: list[Tensor]) -> Tensor:
    """A criterion made for a backend that then turns out not to run."""
    return LoMixLoss(3, 2, impl="cpu")(logits, good_target())


def test_auto_falls_back_and_a_named_backend_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TABLE, "cpu", replace(TABLE["cpu"], why_not=lambda device: "no"))
    _warn_of_fallback.cache_clear()
    logits, target = good_logits(), good_target()
    with pytest.warns(RuntimeWarning, match="instead of the fused cpu kernel: no"):  # once a process
        found = map_stats(logits, target, ADD)[0]
    assert torch.equal(found, map_stats(logits, target, ADD, impl="eager")[0])
    with pytest.raises(RuntimeError):
        map_stats(logits, target, ADD, impl="cpu")


def test_cpu_backend_refuses_other_devices() -> None:
    assert "meta" in str(available_backends("meta")["cpu"])
    logits = [z.to("meta") for z in good_logits()]
    with pytest.raises(RuntimeError, match=r"impl: got 'cpu'.*meta"):
        map_stats(logits, good_target().to("meta"), ADD, impl="cpu")
