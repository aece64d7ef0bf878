"""State of the drop-in: checkpoint keys as the authors' module has them, files, the log of the weights."""

from __future__ import annotations

import logging
import pickle

import pytest
import torch
from torch import Tensor, nn

from lomix_fast.official import CombinatorialMutationsLossModule

CLASSES = 3
ALL = ["add", "mul", "wf", "concat"]


def make(scales: int = 3, operations: list[str] | None = None, **options) -> CombinatorialMutationsLossModule:
    """A module whose parameters are all different."""
    module = CombinatorialMutationsLossModule(scales, CLASSES, scales, operations or ALL, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def fusion_rows(module) -> tuple[list[Tensor], list[Tensor]]:
    convs = [conv for holder in module.weighted_fusion_modules.values() for conv in holder.weight_convs]
    return [conv.weight for conv in convs], [conv.bias for conv in convs]


KEYS = """
original_weights.0 original_weights.1 original_weights.2 original_weights.3
synthesized_weights.add.0 synthesized_weights.add.1 synthesized_weights.add.2 synthesized_weights.add.3
synthesized_weights.add.4 synthesized_weights.add.5 synthesized_weights.add.6 synthesized_weights.add.7
synthesized_weights.add.8 synthesized_weights.add.9 synthesized_weights.add.10
synthesized_weights.mul.0 synthesized_weights.mul.1 synthesized_weights.mul.2 synthesized_weights.mul.3
synthesized_weights.mul.4 synthesized_weights.mul.5 synthesized_weights.mul.6 synthesized_weights.mul.7
synthesized_weights.mul.8 synthesized_weights.mul.9 synthesized_weights.mul.10
synthesized_weights.wf.0 synthesized_weights.wf.1 synthesized_weights.wf.2 synthesized_weights.wf.3
synthesized_weights.wf.4 synthesized_weights.wf.5 synthesized_weights.wf.6 synthesized_weights.wf.7
synthesized_weights.wf.8 synthesized_weights.wf.9 synthesized_weights.wf.10
synthesized_weights.concat.0 synthesized_weights.concat.1 synthesized_weights.concat.2
synthesized_weights.concat.3 synthesized_weights.concat.4 synthesized_weights.concat.5
synthesized_weights.concat.6 synthesized_weights.concat.7 synthesized_weights.concat.8
synthesized_weights.concat.9 synthesized_weights.concat.10
weighted_fusion_modules.2.weight_convs.0.weight weighted_fusion_modules.2.weight_convs.0.bias
weighted_fusion_modules.2.weight_convs.1.weight weighted_fusion_modules.2.weight_convs.1.bias
weighted_fusion_modules.3.weight_convs.0.weight weighted_fusion_modules.3.weight_convs.0.bias
weighted_fusion_modules.3.weight_convs.1.weight weighted_fusion_modules.3.weight_convs.1.bias
weighted_fusion_modules.3.weight_convs.2.weight weighted_fusion_modules.3.weight_convs.2.bias
weighted_fusion_modules.4.weight_convs.0.weight weighted_fusion_modules.4.weight_convs.0.bias
weighted_fusion_modules.4.weight_convs.1.weight weighted_fusion_modules.4.weight_convs.1.bias
weighted_fusion_modules.4.weight_convs.2.weight weighted_fusion_modules.4.weight_convs.2.bias
weighted_fusion_modules.4.weight_convs.3.weight weighted_fusion_modules.4.weight_convs.3.bias
"""
STATE_OF_FOUR_MAPS = KEYS.split()


def test_state_dict_keys_order_and_shapes():
    state = CombinatorialMutationsLossModule(4, CLASSES, selecetd_num_maps=4, operations=ALL).state_dict()
    assert list(state) == STATE_OF_FOUR_MAPS
    for key, value in state.items():
        assert tuple(value.shape) == ((1, CLASSES, 1, 1) if key.endswith(".weight") else (1,))
        assert key.startswith("weighted") or value.item() == 0


def test_state_dict_without_learnable_weights_or_fusion():
    fusion = [key for key in STATE_OF_FOUR_MAPS if key.startswith("weighted")]
    module = CombinatorialMutationsLossModule(4, CLASSES, 4, ["add"], use_learnable_weights=False)
    assert list(module.state_dict()) == fusion


def test_fusion_convolutions_start_as_the_authors_do():
    torch.manual_seed(11)
    module = CombinatorialMutationsLossModule(3, CLASSES, 3, ALL)
    torch.manual_seed(11)
    fresh = [nn.Conv2d(CLASSES, 1, 1) for _ in range(2 + 3)]
    weights, biases = fusion_rows(module)
    assert all(torch.equal(w, conv.weight) for w, conv in zip(weights, fresh, strict=True))
    assert all(torch.equal(b, conv.bias) for b, conv in zip(biases, fresh, strict=True))


def test_save_and_load(tmp_path):
    saved, loaded = make(3), make(3)
    saved.save_weights(tmp_path / "loss.pth")
    loaded.load_weights(str(tmp_path / "loss.pth"))
    for key, value in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    with pytest.raises(RuntimeError, match="synthesized_weights"):
        make(3, ["add"]).load_weights(tmp_path / "loss.pth")


def test_load_runs_no_code(tmp_path):
    torch.save({"original_weights.0": nn.Linear(1, 1)}, tmp_path / "loss.pth")
    with pytest.raises(pickle.UnpicklingError):
        make(3).load_weights(tmp_path / "loss.pth")


def test_print_weights(caplog):
    module = CombinatorialMutationsLossModule(3, CLASSES, 2, ["add", "wf"])
    with torch.no_grad():
        module.synthesized_weights["wf"][0].fill_(2.0)
    with caplog.at_level(logging.INFO):
        module.print_weights()
    lines = [record.getMessage() for record in caplog.records]
    assert any("original" in line and "raw" in line and line.count("0.0000") == 3 for line in lines)
    assert any("original" in line and "softplus" in line and line.count("0.6931") == 3 for line in lines)
    assert any("original" in line and "sum" in line and "2.0794" in line for line in lines)
    assert any("wf" in line and "raw" in line and "2.0000" in line for line in lines)
    assert any("wf" in line and "sum" in line and "2.1269" in line for line in lines)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        make(2, use_learnable_weights=False).print_weights()
    assert "1" in caplog.text and "softplus" not in caplog.text
