"""Facts of a weights file: a certain mismatch with the model is refused with the option, an uncertain one is said."""

import json
from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from model.build import build_task
from model.checkpoints.descriptions import facts_of
from model.load import LoadReport, load_weights
from tests.helpers.checkpoints import our_clip, save_plain, save_torchscript, their_clip
from tests.helpers.configs import config_of
from utils.checkpoint import save_checkpoint
from utils.config import to_yaml
from utils.errors import CheckpointError

GELU = ["model.image.options.act_layer=gelu", "model.text.options.hidden_act=gelu"]
CLIP = "data.image_size=[224, 224]"


def load(path: Path, *overrides: str) -> LoadReport:
    task = our_clip(*overrides)
    return load_weights(task, path, data=config_of("baseline", path, *overrides).data)


def hugging_face(folder: Path, activation: str, **preprocessing: object) -> Path:
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512}
    text = sizes | {"vocab_size": 600, "hidden_act": activation}
    vision = sizes | {"image_size": 64, "patch_size": 16, "hidden_act": activation}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=96)).save_pretrained(folder)
    if preprocessing:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return folder


def test_a_hugging_face_folder_tells_its_activation_and_its_image_size(tmp_path: Path) -> None:
    folder, size = hugging_face(tmp_path, "gelu"), "data.image_size=[32, 128]"
    with pytest.raises(CheckpointError, match=r"image tower .* with gelu \(config\.json.*set model\.image\."):
        load(folder, size)
    with pytest.raises(CheckpointError, match=r"text tower .* got quick_gelu; set model\.text.*_act=gelu"):
        load(folder, size, GELU[0])
    report = load(folder, size, *GELU)
    assert len(report.notes) == 1 and "4x4 (config.json, preprocessor_config.json) resized to 2x8" in report.notes[0]
    load(folder / "model.safetensors", size, *GELU)
    with pytest.raises(CheckpointError, match="with gelu"):
        load(folder / "model.safetensors", size)


def test_a_hugging_face_folder_tells_its_normalisation(tmp_path: Path) -> None:
    folder = hugging_face(tmp_path, "quick_gelu", image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5])
    with pytest.raises(CheckpointError, match=r"set data\.image_mean=\[0\.5, 0\.5, 0\.5\] data\.image_std=\[0\.5"):
        load(folder, "data.image_size=[64, 64]")
    half = ["data.image_mean=[0.5, 0.5, 0.5]", "data.image_std=[0.5, 0.5, 0.5]"]
    assert not load(folder, "data.image_size=[64, 64]", *half).notes


def test_a_damaged_description_is_named(tmp_path: Path) -> None:
    folder = hugging_face(tmp_path, "gelu")
    for content in ("{", '{"vision_config": 3}'):
        (folder / "config.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"config\.json: (damaged, or no JSON|describes no CLIP)"):
            load(folder)


def test_openais_archive_is_known_and_a_bare_state_dict_is_not(tmp_path: Path) -> None:
    state = their_clip((224, 224)).state_dict()
    save_torchscript(state, tmp_path / "ViT-B-16.pt")
    assert not load(tmp_path / "ViT-B-16.pt", CLIP).notes
    with pytest.raises(CheckpointError, match=r"image tower .* with quick_gelu \(OpenAI's CLIP\), got gelu"):
        load(tmp_path / "ViT-B-16.pt", CLIP, *GELU)
    save_plain(state, tmp_path / "clip.pt")
    notes = str(load(tmp_path / "clip.pt", CLIP, GELU[0]).notes)
    assert "activation of the image tower: unknown to the file, gelu in the model; OpenAI's CLIP has" in notes
    assert "activation of the text tower: unknown to the file, quick_gelu in the model" in notes
    other = load(tmp_path / "clip.pt", CLIP, "data.image_mean=[0.5, 0.5, 0.5]").notes
    assert any(note.startswith("data.image_mean: unknown to the file") for note in other)


def test_open_clips_description_beside_the_file_is_read(tmp_path: Path) -> None:
    save_plain(their_clip((224, 224)).state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    model = {"vision_cfg": {"image_size": 224}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    with pytest.raises(CheckpointError, match=r"with gelu \(open_clip_config\.json\), got quick_gelu"):
        load(tmp_path / "open_clip_pytorch_model.bin", CLIP)
    assert not load(tmp_path / "open_clip_pytorch_model.bin", CLIP, *GELU).notes


@pytest.mark.parametrize("format", ["irra", "fmfa", "rde", "mllm4text", "ham"])
def test_published_encoders_have_clips_activation(format: str) -> None:
    facts = facts_of(format, {}, {}, "x.pth")
    assert facts.image_size == (384, 128) and set(facts.activations.values()) == {"quick_gelu"}


def test_our_checkpoints_tell_what_they_were_trained_with(root: Path, tmp_path: Path) -> None:
    config = config_of("baseline", root, "data.text_length=20")
    saved = build_task(config)
    save_checkpoint(tmp_path / "best.pt", {"model": saved.state_dict(), "config": to_yaml(config)})
    state = torch.random.get_rng_state()
    assert facts_of("own", {"config": to_yaml(config)}, {}, "x").activations == saved.encoder.activations
    assert torch.equal(torch.random.get_rng_state(), state)

    def again(*overrides: str) -> LoadReport:
        other = config_of("baseline", root, "data.text_length=20", *overrides)
        return load_weights(build_task(other), tmp_path / "best.pt", data=other.data)

    assert not again().notes
    assert "training captions had at most 20 tokens" in str(again("data.text_length=30").notes)
    with pytest.raises(CheckpointError, match=r"with quick_gelu \(the config inside\), got gelu; set model\.image\."):
        again("model.image.options.act_layer=gelu")
    with pytest.raises(CheckpointError, match=r"was trained with data\.image_std=.* set data\.image_mean="):
        again("data.image_std=[0.5, 0.5, 0.5]")


def test_another_context_length_names_its_options(tmp_path: Path) -> None:
    save_plain(their_clip((224, 224)).state_dict(), tmp_path / "clip.pt")
    with pytest.raises(CheckpointError, match=r"set model\.text\.options\.max_position_embeddings=77 and data"):
        load(tmp_path / "clip.pt", CLIP, "model.text.options.max_position_embeddings=90")
