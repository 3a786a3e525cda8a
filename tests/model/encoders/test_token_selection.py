"""Token selection: the authors' layers, the choice of tokens, and the encoder around CLIP's towers."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from configs.schema import load_config
from model.build import build_encoder, build_task
from model.encoders import Encoded, token_selection
from model.encoders.token_selection import TokenMLP, TokenSelectionEncoder, attention, select, select_words
from model.task import RetrievalTask
from tests.helpers.configs import GOLDEN, ROOT, TINY
from utils.errors import ConfigError

THEIRS = {"hidden": "mlp.layers.0", "out": "mlp.layers.1", "norm": "mlp.bns.0"}  # `skip` differs by tower
VOCAB = 1024


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    stored = np.load(GOLDEN / "rde_public.npz")
    return {name.removeprefix("case0/tse/"): stored[name] for name in stored.files if name.startswith("case0/tse/")}


def names_of(tower: str) -> dict[str, str]:
    return {**THEIRS, "skip": {"vis": "fc", "txt": "linear"}[tower]}


def golden_layer(golden: dict[str, np.ndarray], tower: str, *, frozen: bool = False) -> TokenMLP:
    layer = TokenMLP(16, 24, frozen).double()
    state = {}
    for ours, theirs in names_of(tower).items():
        prefix = f"{tower}/state/{theirs}."
        state |= {f"{ours}.{n.removeprefix(prefix)}": torch.from_numpy(v) for n, v in golden.items() if prefix in n}
    layer.load_state_dict(state)
    return layer


def chosen_tokens(golden: dict[str, np.ndarray], case: str) -> tuple[Tensor, Tensor | None]:
    """Tokens chosen by the authors' attention, and the number of them that is pooled."""
    rows = torch.from_numpy(golden[f"{case}/attn"])
    k, ratio = int(golden[f"{case}/k"]), float(golden["ratio"])
    if case == "vis":
        assert k == int((rows.shape[1] - 1) * ratio)
        return 1 + rows[:, 0, 1:].topk(k).indices, None
    assert k == int((rows.shape[1] - 2) * ratio)
    end = torch.from_numpy(golden[f"{case}/ids"]).argmax(dim=1)
    return select_words(rows[torch.arange(len(rows)), end], end, k)


# --- the authors' layers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["vis", "txt", "txtlong"])
def test_the_chosen_tokens_are_the_authors(case: str, golden: dict[str, np.ndarray]) -> None:
    chosen, count = chosen_tokens(golden, case)
    expected = torch.from_numpy(golden[f"{case}/topk_idx"])
    if count is None:
        assert torch.equal(chosen - 1, expected) or torch.equal(chosen, expected)
        return
    assert torch.equal(count, torch.from_numpy(golden[f"{case}/pooled_len"]))
    assert (count < chosen.shape[1]).any() == (case == "txt")
    for ours, theirs, most in zip(chosen, expected, count.tolist(), strict=True):
        assert torch.equal(ours[:most], theirs[:most])  # the rest is arbitrary padding


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("case", ["vis", "txt", "txtlong"])
def test_outputs_gradients_and_statistics_are_the_authors(case: str, mode: str, golden: dict[str, np.ndarray]) -> None:
    tower = case[:3]
    layer = golden_layer(golden, tower).train(mode == "train")
    features = torch.from_numpy(golden[f"{case}/features"]).clone().requires_grad_()
    chosen, count = chosen_tokens(golden, case)
    out = layer(select(features, chosen), count)
    np.testing.assert_allclose(out.detach(), golden[f"{case}/{mode}/out"], rtol=1e-7, atol=1e-10)
    (out * torch.from_numpy(golden[f"{case}/cotangent"])).sum().backward()
    assert features.grad is not None
    ours, theirs = features.grad.numpy(), golden[f"{case}/{mode}/grad_features"]
    if (case, mode) == ("txt", "train"):  # the choice of padding is arbitrary, but enters the statistics
        end = golden["txt/ids"].argmax(axis=1)
        for row, last in enumerate(end):
            np.testing.assert_allclose(ours[row, : last + 1], theirs[row, : last + 1], rtol=1e-6, atol=1e-9)
            np.testing.assert_allclose(
                ours[row, last + 1 :].sum(0), theirs[row, last + 1 :].sum(0), rtol=1e-6, atol=1e-9
            )
    else:
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-9)
    for name, parameter in layer.named_parameters():
        part, kind = name.rsplit(".", 1)
        expected = golden[f"{case}/{mode}/grad/{names_of(tower)[part]}.{kind}"]
        np.testing.assert_allclose(parameter.grad, expected, rtol=1e-6, atol=1e-9, err_msg=name)
    if mode == "train":
        for name, buffer in layer.norm.named_buffers():
            np.testing.assert_allclose(buffer, golden[f"{case}/train/after/mlp.bns.0.{name}"], rtol=1e-9)


def test_the_joint_embedding_has_the_mean_of_both_similarities(golden: dict[str, np.ndarray]) -> None:
    sides = []
    for case in ("vis", "txt"):
        features = torch.from_numpy(golden[f"{case}/features"])
        place = 0 if case == "vis" else torch.from_numpy(golden["txt/ids"]).argmax(dim=1)
        chosen, count = chosen_tokens(golden, case)
        selected = golden_layer(golden, case).eval()(select(features, chosen), count)
        sides.append(Encoded(features[torch.arange(len(features)), place], features, (selected,)))
    image, text = sides

    def cosines(a: Tensor, b: Tensor) -> np.ndarray:
        return (F.normalize(a) @ F.normalize(b).T).detach().numpy()

    np.testing.assert_allclose(cosines(text.embedding, image.embedding), golden["sim_bge"], rtol=1e-6)
    np.testing.assert_allclose(cosines(text.more[0], image.more[0]), golden["sim_tse"], rtol=1e-6)
    np.testing.assert_allclose(cosines(text.joint, image.joint), golden["sim_fused"], rtol=1e-5, atol=1e-6)


# --- a single layer ---------------------------------------------------------------------------------------------------


def random_layer(frozen: bool = True) -> TokenMLP:
    torch.manual_seed(0)
    layer = TokenMLP(8, 12, frozen)
    torch.nn.init.normal_(layer.norm.weight)
    torch.nn.init.normal_(layer.norm.bias)
    return layer


def test_the_layer_equals_an_explicit_loop() -> None:
    layer = random_layer().double().eval()
    tokens = torch.randn(3, 4, 8, dtype=torch.float64)
    count = torch.tensor([4, 1, 2])
    weights = {name: value.detach().numpy() for name, value in layer.named_parameters()}
    for row, most in enumerate(count.tolist()):
        values = []
        for token in tokens[row, :most].numpy():
            token = token / (np.sqrt((token**2).sum()) + 1e-8)
            hidden = weights["hidden.weight"] @ token + weights["hidden.bias"]
            hidden = weights["norm.weight"] * hidden / np.sqrt(1 + 1e-5) + weights["norm.bias"]
            out = weights["out.weight"] @ np.maximum(hidden, 0) + weights["out.bias"]
            values.append(out + weights["skip.weight"] @ token + weights["skip.bias"])
        np.testing.assert_allclose(layer(tokens, count)[row].detach(), np.max(values, axis=0), rtol=1e-10)


def test_frozen_statistics_never_move_and_training_is_as_evaluation() -> None:
    layer = random_layer()
    layer.norm.running_mean.normal_()  # type: ignore[union-attr]
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    tokens = torch.randn(5, 4, 8)
    trained = layer.train()(tokens)
    trained.sum().backward()
    assert layer.norm.weight.grad is not None and layer.norm.weight.grad.any()  # gamma and beta are trained
    assert torch.equal(trained, layer.eval()(tokens))
    assert all(torch.equal(before[name], buffer) for name, buffer in layer.named_buffers())
    moving = random_layer(frozen=False)
    assert not torch.equal(moving.train()(tokens), moving.eval()(tokens))
    assert int(moving.norm.num_batches_tracked) == 1  # type: ignore[arg-type]


def test_a_zero_token_is_finite() -> None:
    tokens = torch.zeros(2, 3, 8, requires_grad=True)
    out = random_layer()(tokens)
    assert out.isfinite().all()


# --- choice of tokens -------------------------------------------------------------------------------------------------


def loop_words(scores: list[float], end: int, k: int) -> list[int]:
    words = sorted(range(1, end), key=lambda place: -scores[place])[:k]
    return words or [end]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("k", [1, 3, 8, 12])
def test_words_are_chosen_by_attention(seed: int, k: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(6, 10, generator=generator)
    end = torch.tensor([1, 2, 4, 6, 8, 9])
    before = scores.clone()
    chosen, count = select_words(scores, end, k)
    assert torch.equal(scores, before)
    assert chosen.shape == (6, min(k, 10))
    for row in range(6):
        assert chosen[row, : count[row]].tolist() == loop_words(scores[row].tolist(), int(end[row]), k)
        padding = chosen[row, count[row] :]
        if k <= 8 - int(end[row]):  # there is enough padding
            assert (padding > end[row]).all()


def test_attention_is_a_mean_of_softmaxes() -> None:
    generator = torch.Generator().manual_seed(0)
    query, keys = torch.randn(2, 3, 4, generator=generator), torch.randn(2, 3, 5, 4, generator=generator)
    seen = torch.tensor([[True] * 5, [True, True, True, False, False]])
    found = attention(query, keys, seen)
    for row in range(2):
        places = range(int(seen[row].sum()))
        expected = np.zeros(5)
        for head in range(3):
            exponentials = np.array([np.exp(float(query[row, head] @ keys[row, head, place]) / 2) for place in places])
            expected[: len(places)] += exponentials / exponentials.sum() / 3
        np.testing.assert_allclose(found[row], expected, rtol=1e-5)
    torch.testing.assert_close(attention(query, keys).sum(dim=1), torch.ones(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):  # the choice does not depend on the precision
        assert torch.equal(attention(query, keys, seen), found)


# --- the encoder ------------------------------------------------------------------------------------------------------


def tiny_encoder(*overrides: str) -> TokenSelectionEncoder:
    torch.manual_seed(0)
    layers = [
        "model.image.options.depth=2",
        "model.image.options.num_heads=4",
        "model.text.options.num_hidden_layers=2",
    ]
    heads = ["model.text.options.num_attention_heads=4", "model.selected_dim=48"]
    config = load_config(ROOT / "configs/rde.yaml", [*TINY, *layers, *heads, *overrides])
    assert config.model["name"] == "token_selection"
    encoder = build_encoder(config)
    assert isinstance(encoder, TokenSelectionEncoder)
    for parameter in encoder.parameters():  # makes attention far from uniform
        torch.nn.init.normal_(parameter, std=0.3)
    return encoder


def captions(*words: int, length: int = 64) -> Tensor:
    """Random captions with these numbers of words: int64 (B, length)."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.zeros(len(words), length, dtype=torch.int64)
    for row, number in enumerate(words):
        ids[row, 1 : number + 1] = torch.randint(1, VOCAB - 3, (number,), generator=generator)
        ids[row, 0], ids[row, number + 1] = VOCAB - 2, VOCAB - 1
    return ids


def images(size: int = 3) -> Tensor:
    return torch.randn(size, 3, 64, 32, generator=torch.Generator().manual_seed(1))


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Results of all later calls of `attention`."""
    found: list[Tensor] = []

    def spy(*args) -> Tensor:
        found.append(attention(*args))
        return found[-1]

    monkeypatch.setattr(token_selection, "attention", spy)
    return found


def test_sizes_are_the_papers() -> None:
    """57 patches and 22 words are selected from 384x128 at stride 16 and 77 tokens."""
    config = load_config(ROOT / "configs/rde.yaml", ["model.image.pretrained=false", "model.text.pretrained=false"])
    with torch.device("meta"):
        encoder = TokenSelectionEncoder((384, 128), 77, False, ratio=config.model["ratio"])
    assert (encoder.num_patches, encoder.num_words) == (57, 22)
    assert encoder.embeddings == {"bge": 512, "tse": 1024}
    shapes = {name: tuple(value.shape) for name, value in encoder.selection["image"].named_parameters()}
    assert shapes["hidden.weight"] == (512, 512) and shapes["out.weight"] == shapes["skip.weight"] == (1024, 512)


def test_patches_are_chosen_by_the_attention_inside_the_last_block(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, found = tiny_encoder("model.image.stride=8").eval(), recorded(monkeypatch)
    layer, inputs = encoder.image.trunk.blocks[-1].attn, []
    layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    encoded = encoder.encode_image(images())
    (x,), (scores,) = inputs, found
    query, keys, _ = F.linear(x, layer.qkv.weight, layer.qkv.bias).view(3, -1, 3, 4, 16).permute(2, 0, 3, 1, 4)
    weights = (query @ keys.transpose(2, 3) / 4).softmax(dim=3).mean(dim=1)
    torch.testing.assert_close(scores, weights[:, 0], rtol=1e-4, atol=1e-6)
    assert float(scores.std()) > 0.001
    chosen = 1 + scores[:, 1:].topk(encoder.num_patches).indices
    expected = encoder.selection["image"](select(encoded.tokens, chosen))
    assert torch.equal(encoded.more[0], expected) and encoded.more[0].shape == (3, 48)
    assert torch.equal(encoded.embedding, encoded.tokens[:, 0])


@pytest.mark.parametrize("length", [64, 14])
def test_words_are_chosen_by_the_attention_of_the_end_of_text(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, found = tiny_encoder().eval(), recorded(monkeypatch)
    ids = captions(12, 3, 1, 9)[:, :length]
    encoded = encoder.encode_text(ids)
    trunk = copy.deepcopy(encoder.text.trunk)
    trunk.config._attn_implementation = "eager"
    weights = trunk(input_ids=ids, output_attentions=True).attentions[-1].mean(dim=1)
    end = ids.argmax(dim=1)
    torch.testing.assert_close(found[0], weights[torch.arange(4), end], rtol=1e-4, atol=1e-6)
    for row, words in enumerate((12, 3, 1, 9)):
        places = loop_words(found[0][row].tolist(), words + 1, encoder.num_words)
        expected = encoder.selection["text"](encoded.tokens[row : row + 1, places])
        torch.testing.assert_close(encoded.more[0][row : row + 1], expected)


def test_padding_columns_change_nothing() -> None:
    encoder, ids = tiny_encoder().train(), captions(12, 3, 1, 9)
    whole, cut = encoder.encode_text(ids), encoder.encode_text(ids[:, :14])
    torch.testing.assert_close(whole.more[0], cut.more[0], rtol=1e-5, atol=1e-5)


def test_a_caption_without_words_has_its_end_of_text() -> None:
    encoder = tiny_encoder().eval()
    ids = captions(0, 5)
    encoded = encoder.encode_text(ids)
    encoded.more[0].sum().backward()
    torch.testing.assert_close(encoded.more[0][:1], encoder.selection["text"](encoded.tokens[:1, 1:2]))
    assert all(p.grad is None or p.grad.isfinite().all() for p in encoder.parameters())


def test_tokens_that_are_not_chosen_do_not_matter_and_the_choice_gets_no_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder, found = tiny_encoder("model.image.stride=8"), recorded(monkeypatch)
    encoded = encoder.encode_image(images())
    encoded.tokens.retain_grad()
    encoded.more[0].sum().backward()
    assert not found[0].requires_grad and encoded.tokens.grad is not None
    touched = encoded.tokens.grad.abs().sum(dim=2) > 0
    assert (touched.sum(dim=1) <= encoder.num_patches).all() and not touched[:, 0].any()
    assert encoder.image_attention.query is None and encoder.text_attention.keys is None  # no activation is kept alive


def test_one_chosen_token_gives_its_own_value() -> None:
    encoder = tiny_encoder("model.ratio=0.01").eval()
    assert (encoder.num_patches, encoder.num_words) == (1, 1)
    encoded = encoder.encode_text(captions(7, 2))
    every = encoder.selection["text"](encoded.tokens.flatten(0, 1)[:, None]).unflatten(0, encoded.tokens.shape[:2])
    for row, value in zip(every, encoded.more[0], strict=True):
        assert (row - value).abs().amax(dim=1).min() < 1e-5


def test_the_other_blocks_are_left_as_fast_as_they_were() -> None:
    encoder = tiny_encoder()
    watched = [name for name, module in encoder.named_modules() if module._forward_hooks]
    assert sorted(watched) == [
        "image.trunk.blocks.1.attn.k_norm",
        "image.trunk.blocks.1.attn.q_norm",
        "text.trunk.encoder.layers.1.self_attn.k_proj",
        "text.trunk.encoder.layers.1.self_attn.q_proj",
    ]
    assert all(block.attn.fused_attn for block in encoder.image.trunk.blocks)
    assert encoder.text.trunk.config._attn_implementation == "sdpa"


def test_a_copy_watches_its_own_towers() -> None:
    encoder = tiny_encoder().eval()
    expected = encoder.encode_image(images()).more[0]
    twin = copy.deepcopy(encoder)
    for parameter in encoder.parameters():
        torch.nn.init.zeros_(parameter)
    assert torch.equal(twin.encode_image(images()).more[0], expected)


def test_compiled_towers_select_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = tiny_encoder().eval()
    ids = captions(12, 3)
    expected = encoder.encode_image(images()), encoder.encode_text(ids)
    for tower in (encoder.image, encoder.text):
        tower.compile(backend="eager")
    for _ in range(2):
        torch.testing.assert_close(encoder.encode_image(images()).more[0], expected[0].more[0])
        torch.testing.assert_close(encoder.encode_text(ids).more[0], expected[1].more[0])


def test_it_runs_under_autocast() -> None:
    encoder = tiny_encoder()
    exact = encoder.encode_image(images()).joint.detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        encoded = encoder.encode_image(images()), encoder.encode_text(captions(5, 3, 2))
    assert all(part.joint.dtype == torch.float32 and part.joint.isfinite().all() for part in encoded)
    assert float(F.cosine_similarity(encoded[0].joint.detach(), exact).min()) > 0.9


@pytest.mark.parametrize(
    "override, message",
    [
        ("model.ratio=0", r"model\.ratio: must be above 0 and at most 1, got"),
        ("model.ratio=1.2", r"model\.ratio: must be above 0 and at most 1, got"),
        ("model.selected_dim=1", r"model\.selected_dim: must be from 2 to 1,000,000"),
        ("model.bn=none", r"model\.bn: "),
        ("model.image.arch=vit_base_patch16_siglip_224", r"model\.image\.arch: must have a class token"),
    ],
)
def test_bad_options_are_errors(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        overrides = [o for o in TINY if "weight_init" not in o] if "siglip" in override else TINY
        small = ["model.image.options={embed_dim: 64, depth: 1, num_heads: 1, patch_size: 16}"]
        build_encoder(load_config(ROOT / "configs/rde.yaml", [*overrides, *small, override]))


# --- the task ---------------------------------------------------------------------------------------------------------


def rde_task(*overrides: str) -> RetrievalTask:
    torch.manual_seed(0)
    return build_task(load_config(ROOT / "configs/rde.yaml", [*TINY, "model.selected_dim=48", *overrides]), num_pids=4)


def batch_of(size: int = 4) -> dict[str, Tensor]:
    pids = torch.tensor([0, 1, 1, 3])[:size]
    return {
        "images": images(size),
        "caption_ids": captions(8, 3, 5, 2)[:size],
        "pids": pids,
        "index": torch.arange(size),
    }


@pytest.mark.parametrize("loss", ["tal", "trl", "sdm", "itc", "asdm", "cmpm"])
def test_a_loss_on_pairs_is_taken_of_both_embeddings(loss: str) -> None:
    task = rde_task("losses.tal=null", f"losses.{loss}={{}}")
    step = task.gathered_step(batch_of())
    assert [image.shape[1] for image, _ in step.embeddings] == [64, 48]
    losses = task.objectives[loss].pair_losses(step)  # type: ignore[operator, union-attr]
    assert losses.shape == (2, 4)
    total, _ = task(batch_of())
    each = losses.sum(dim=1) if loss in ("tal", "trl") else losses.mean(dim=1)
    torch.testing.assert_close(total, each.sum())


def test_batch_statistics_need_the_padding() -> None:
    assert rde_task("model.bn=batch").full_text and not rde_task().full_text


def test_other_losses_take_the_global_embedding() -> None:
    task = rde_task("losses.id={}", "losses.mlm={depth: 1}")
    assert task.objectives["id"].classifier.weight.shape == (4, 64)  # type: ignore[union-attr]
    ids = captions(8, 3, 5, 2)
    labels = torch.zeros_like(ids)
    labels[:, 1] = ids[:, 1]
    extra = {"mlm_ids": ids, "mlm_labels": labels, "mlm_positions": labels.flatten().nonzero().squeeze(1)}
    total, terms = task(batch_of() | extra)
    total.backward()
    assert {"tal_loss", "id_loss", "mlm_loss"} <= set(terms) and total.isfinite()
