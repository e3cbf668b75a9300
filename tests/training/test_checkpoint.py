"""Checkpoints: whole or absent, verified when read, one clear line for every damage."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from antlm_fast.models import BabyLlama, BabyLlamaConfig
from antlm_fast.training.checkpoint import (
    TrainState,
    latest_checkpoint,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)
from antlm_fast.training.optimizer import OptimizerConfig, build_optimizer
from antlm_fast.types import InputError


def made(seed=0, kind="adamw", **changes):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1}
    model = BabyLlama(BabyLlamaConfig(**(sizes | {"num_attention_heads": 2} | changes)))
    return model, build_optimizer(model, OptimizerConfig(lr=1e-2, kind=kind))


def stepped(model, optimizer, steps=2):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.arange(8)[None], causal=True).square().mean().backward()
        optimizer.step()
    return model, optimizer


def state(step):
    return TrainState(
        step=step, tokens=step * 10, metrics_bytes=7, loss_sums={"CLM": 0.1 + 0.2}, loss_counts={"CLM": 3}
    )


@pytest.fixture
def folder(tmp_path):
    model, optimizer = stepped(*made())
    for step in (5, 10, 15):
        save_checkpoint(tmp_path, state(step), model, optimizer, keep=2)
    return tmp_path


@pytest.mark.parametrize("kind", ["adamw", "lamb"])
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_read_back_goes_on_exactly(tmp_path, tied, kind):
    first = stepped(*made(tie_word_embeddings=tied, kind=kind))
    path = save_checkpoint(tmp_path, state(5), *first, keep=1)
    second = made(seed=9, tie_word_embeddings=tied, kind=kind)
    assert load_checkpoint(path, *second) == state(5)
    for model, optimizer in (first, second):
        stepped(model, optimizer, 3)
    for ours, theirs in zip(first[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_only_the_newest_are_kept(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000010", "step_00000015"]
    assert latest_checkpoint(folder).name == "step_00000015"
    assert latest_checkpoint(folder / "nothing") is None


def test_the_ends_of_phases_are_dropped_with_the_rest(tmp_path):
    model, optimizer = stepped(*made())
    for step in (5, 10, 15, 20, 25):
        save_checkpoint(tmp_path, state(step), model, optimizer, keep=2, keep_steps=(5, 15, 25))
    assert [int(path.name.removeprefix("step_")) for path in sorted(tmp_path.iterdir())] == [5, 15, 20, 25]


def test_a_validation_that_was_due_is_done_and_the_checkpoint_knows(folder):
    before = (folder / "step_00000015" / "model.safetensors").stat().st_mtime_ns
    path = save_checkpoint(folder, replace(state(15), validation_due=True), *made(), keep=2)
    assert load_checkpoint(path, *made()).validation_due
    save_checkpoint(folder, state(15), *made(), keep=2)
    assert load_checkpoint(path, *made()) == state(15)
    assert (path / "model.safetensors").stat().st_mtime_ns == before
    document = json.loads((path / "state.json").read_text())
    del document["state"]["validation_due"]  # as checkpoints were before there was such a thing
    (path / "state.json").write_text(json.dumps(document))
    assert load_checkpoint(path, *made()) == state(15)


def test_nothing_in_a_checkpoint_is_pickled(folder):
    names = {path.name for path in folder.glob("step_*/*")}
    assert names == {"model.safetensors", "optimizer.safetensors", "state.json"}


def test_the_average_has_a_file_of_its_own(tmp_path):
    model, optimizer = stepped(*made())
    average = {name: parameter.detach() / 3 for name, parameter in model.named_parameters()}
    path = save_checkpoint(tmp_path, state(5), model, optimizer, keep=1, average=average)
    found = {name: torch.zeros_like(tensor) for name, tensor in average.items()}
    load_checkpoint(path, *made(seed=9), average=found)
    assert all(torch.equal(found[name], tensor) for name, tensor in average.items())
    load_checkpoint(path, *made(seed=9))  # and may be left where it is
    content = bytearray((path / "average.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "average.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="average.safetensors is damaged"):
        load_checkpoint(path, *made(seed=9), average=found)


def test_the_weights_of_a_checkpoint_are_the_average_where_it_has_one(tmp_path):
    model, optimizer = stepped(*made())
    average = {name: parameter.detach() / 3 for name, parameter in model.named_parameters()}
    own = save_checkpoint(tmp_path / "own", state(5), model, optimizer, keep=1)
    averaged = save_checkpoint(tmp_path / "average", state(5), model, optimizer, keep=1, average=average)
    for path, factor in ((own, 1), (averaged, 3)):
        found = made(seed=9)[0]
        load_weights(path, found)
        for name, parameter in found.named_parameters():
            assert torch.equal(parameter, model.get_parameter(name) / factor)
    with pytest.raises(InputError, match="does not match the run's vocabulary"):
        load_weights(averaged, made(vocab_size=31)[0])
    (averaged / "average.safetensors").unlink()  # never the other weights instead
    with pytest.raises(InputError, match="average.safetensors is missing"):
        load_weights(averaged, made()[0])


def test_an_average_that_was_never_kept_is_missed(folder):
    model, optimizer = made(seed=3)
    before = model.head_weight.clone()
    average = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with pytest.raises(InputError, match="must hold average.safetensors where optimizer.ema_decay is set; got none"):
        load_checkpoint(folder / "step_00000015", model, optimizer, average=average)
    assert torch.equal(model.head_weight, before)


def test_a_writer_that_was_killed_leaves_nothing_that_counts(folder):
    shutil.copytree(folder / "step_00000015", folder / ".writing_step_00000020")
    assert latest_checkpoint(folder).name == "step_00000015"
    save_checkpoint(folder, state(20), *stepped(*made()), keep=2)  # and is written over
    assert latest_checkpoint(folder).name == "step_00000020"


def test_a_failed_write_leaves_the_others_alone(folder, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("antlm_fast.training.checkpoint.write_safetensors", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(folder, state(20), *stepped(*made()), keep=1)
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000010", "step_00000015"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_a_truncated_file_is_named_with_a_way_out(folder, name):
    path = folder / "step_00000015" / name
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match=rf"{name} is cut short: .* resume from step_00000010"):
        load_checkpoint(folder / "step_00000015", *made())


def test_an_altered_file_is_noticed(folder):
    path = folder / "step_00000015" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"model.safetensors is damaged: its sha256 is not the one written"):
        load_checkpoint(folder / "step_00000015", *made())


def test_missing_files_and_a_damaged_state_are_named(folder):
    newest = folder / "step_00000015"
    (newest / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model.safetensors is missing"):
        load_checkpoint(newest, *made())
    (newest / "state.json").write_text("{")
    with pytest.raises(InputError, match=r"is damaged: state.json cannot be read"):
        load_checkpoint(newest, *made())


def test_another_vocabulary_or_model_is_refused_and_nothing_is_restored(folder):
    model, optimizer = made(seed=3, vocab_size=31)
    before = model.head_weight.clone()
    with pytest.raises(
        InputError, match=r"does not match the run's vocabulary: .* must have shape \(31, 16\); got \(30, 16\)"
    ):
        load_checkpoint(folder / "step_00000015", model, optimizer)
    assert torch.equal(model.head_weight, before)
    with pytest.raises(InputError, match="does not match the run's model"):
        load_checkpoint(folder / "step_00000015", *made(num_hidden_layers=2))


def test_state_holds_exact_numbers(folder):
    document = json.loads((folder / "step_00000015" / "state.json").read_text())
    assert document["state"]["loss_sums"]["CLM"] == 0.1 + 0.2
