"""The heads for images and modalities: patches, rows apart from each other, what is missing, loading."""

import pytest
import torch
from transformers import AutoModelForImageClassification

from pikv_core.data.vision import patches
from pikv_core.errors import UsageError
from pikv_core.model import PiKVConfig, PiKVForImageClassification, PiKVForModalityClassification

SIZES = {
    "vocab_size": 0,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_experts": 8,
    "initializer_range": 0.2,
    "num_labels": 5,
}


def image_model(**more):
    torch.manual_seed(0)
    return PiKVForImageClassification(PiKVConfig(**SIZES, **more)).eval()


def modality_model(**more):
    torch.manual_seed(0)
    return PiKVForModalityClassification(PiKVConfig(router="flex", **SIZES, **more)).eval()


def samples(number=9):
    generator = torch.Generator().manual_seed(1)
    present = torch.rand(number, 3, generator=generator) < 0.6
    present[torch.arange(number), torch.arange(number) % 3] = True
    return torch.randn(number, 3, 10, generator=generator), present


@pytest.mark.parametrize("side", [1, 2, 4, 8])
def test_patches_are_those_of_the_data(side):
    images = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(1))
    cut = image_model(patch_size=side).patches(images[:, None])
    assert torch.equal(cut, torch.from_numpy(patches(16 * images.double().numpy(), side)))


def test_the_mean_over_the_decoders_patches_is_classified():
    model = image_model(num_channels=3, image_size=12, patch_size=3)
    x = torch.randn(4, 3, 12, 12)
    out = model(x, output_hidden_states=True, output_router_logits=True)
    assert torch.allclose(out.logits, model.classifier(out.hidden_states[-1].mean(1)), atol=1e-6)
    assert out.hidden_states[0].shape == (4, 16, 32) and len(out.router_logits) == 2
    moved = x.clone()
    moved[:, :, :3, :3], moved[:, :, 9:, 9:] = x[:, :, 9:, 9:], x[:, :, :3, :3]
    assert not torch.allclose(model(moved).logits, out.logits, atol=1e-3)


def test_rows_of_a_batch_are_independent():
    images, (values, present) = torch.rand(9, 1, 8, 8), samples()
    for model, inputs in ((image_model(), (images,)), (modality_model(), (values, present))):
        whole = model(*inputs).logits
        for row in range(9):
            one = model(*(part[row : row + 1] for part in inputs)).logits
            torch.testing.assert_close(one[0], whole[row], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("filling", ["bank", "zero"])
def test_what_missing_modalities_hold_changes_nothing(filling):
    model = modality_model(missing_modalities=filling).train()
    values, present = samples()
    labels = torch.arange(9) % 5
    empty = torch.where(present[..., None], values, torch.nan)
    losses, gradients = [], []
    for x in (values, empty):
        model.zero_grad()
        loss = model(x, present, labels=labels).loss
        loss.backward()
        losses.append(loss)
        gradients.append([weight.grad.clone() for weight in model.parameters() if weight.grad is not None])
    assert torch.equal(*losses) and losses[0].isfinite()
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_a_missing_modality_is_told_to_the_routers_with_a_bank_alone():
    values, present = samples()
    missing = present.logical_not().any(1)
    for filling, told in (("bank", True), ("zero", False)):
        outputs = modality_model(missing_modalities=filling).decode(values, present)
        assert bool(outputs.aux_losses["combination"] > 0) == told
        assert modality_model(missing_modalities=filling).decode(values[~missing]).aux_losses["combination"] == 0
    zero = modality_model(missing_modalities="zero")
    filled = torch.where(present[..., None], values, 0)
    assert torch.equal(zero(values, present).logits, zero(filled).logits)


def test_each_modality_is_embedded_by_its_own_map():
    model = modality_model()
    values, _ = samples()
    first = model.decode(values, output_hidden_states=True).hidden_states[0]
    weights, biases = model.modality_proj.weight.split(32), model.modality_proj.bias.split(32)
    for modality in range(3):
        expected = values[:, modality] @ weights[modality].T + biases[modality]
        torch.testing.assert_close(first[:, modality], expected, atol=1e-5, rtol=1e-5)


def test_the_loss_is_the_cross_entropy_and_in_training_that_of_the_routers_too():
    model, x, labels = image_model(), torch.rand(6, 1, 8, 8), torch.arange(6) % 5
    out = model(x, labels=labels)
    assert out.loss.item() == pytest.approx(torch.nn.functional.cross_entropy(out.logits, labels).item())
    trained = model.train()(x, labels=labels)
    assert trained.loss.item() == pytest.approx(out.loss.item() + trained.aux_loss.item(), rel=1e-5)
    assert torch.equal(model.eval()(x, labels=labels, return_dict=False)[1], out.logits)


def test_saved_models_load_by_their_classes_with_the_same_weights(tmp_path):
    images, (values, present) = torch.rand(5, 1, 8, 8), samples(5)
    model = image_model()
    model.save_pretrained(tmp_path / "images")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "images").eval()
    torch.testing.assert_close(loaded(images).logits, model(images).logits, atol=1e-6, rtol=1e-5)
    assert loaded.get_input_embeddings() is None
    model = modality_model()
    model.save_pretrained(tmp_path / "modalities")
    loaded = PiKVForModalityClassification.from_pretrained(tmp_path / "modalities").eval()
    weights = loaded.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    # Where weights lie in memory decides the kernels' last bits.
    torch.testing.assert_close(loaded(values, present).logits, model(values, present).logits, atol=1e-6, rtol=1e-5)


def test_wrong_shapes_and_options_are_refused():
    with pytest.raises(UsageError, match="pixel_values: expected images of 1 x 8 x 8, got 3 x 8 x 8"):
        image_model()(torch.rand(2, 3, 8, 8))
    with pytest.raises(UsageError, match="modalities: expected samples of 3 x 10 numbers, got 3 x 9"):
        modality_model()(torch.rand(2, 3, 9))
    with pytest.raises(UsageError, match="image_size: expected a multiple of patch_size 3, got 8"):
        image_model(patch_size=3)
    with pytest.raises(UsageError, match="missing_modalities: expected bank or zero, got 'mean'"):
        modality_model(missing_modalities="mean")
    with pytest.raises(UsageError, match="no observed modality"):
        modality_model()(torch.rand(2, 3, 10), torch.zeros(2, 3, dtype=torch.bool))
