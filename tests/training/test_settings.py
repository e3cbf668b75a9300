"""Settings as text: every value reaches its field, every mistake is named with what would have been right."""

import dataclasses
import json

import pytest

from antlm_fast.recipes import RECIPES, get_recipe
from antlm_fast.training.config import TrainConfig
from antlm_fast.training.settings import apply_settings, from_dict, read_config_file, to_dict
from antlm_fast.types import InputError


def test_settings_reach_their_fields():
    config = apply_settings(
        get_recipe("demo"),
        [
            "optimizer.lr=1e-3",
            "optimizer.clip_norm=none",
            "optimizer.reset_on_switch=true",
            "batch.rows_per_micro_batch=8",
            "schedule=1_CLM+1_MLM",
            "masking.strategy=span",
            "evaluation.read_outs=causal, mntp",
            "data.validation=held out.txt",
            "model.num_key_value_heads=2",
        ],
    )
    assert config.optimizer.lr == 1e-3
    assert config.optimizer.clip_norm is None
    assert config.optimizer.reset_on_switch is True
    assert config.batch.rows_per_micro_batch == 8
    assert config.schedule == "1_CLM+1_MLM"
    assert config.masking.strategy == "span"
    assert config.evaluation.read_outs == ("causal", "mntp")
    assert config.data.validation == "held out.txt"
    assert config.model.num_key_value_heads == 2
    assert config.optimizer.weight_decay == get_recipe("demo").optimizer.weight_decay


def test_settings_that_need_each_other_may_come_in_any_order():
    settings = ["model.hidden_size=66", "model.num_attention_heads=3"]
    assert apply_settings(get_recipe("demo"), settings) == apply_settings(get_recipe("demo"), settings[::-1])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optimizer.learning_rate=1", "setting 'optimizer.learning_rate' must be a known name; the nearest are"),
        ("lr=1", "setting 'lr' must be a known name; the nearest are optimizer.lr"),
        ("optimiser.lr=1", "setting 'optimiser' must be a known name; the nearest are optimizer"),
        ("optimizer.lr=fast", "optimizer.lr must be a number; got 'fast'"),
        ("optimizer.lr=nan", "optimizer.lr must be a number; got 'nan'"),
        ("optimizer.lr=-1", "optimizer.lr must be above 0; got -1.0"),
        ("batch.rows_per_step=1.5", "batch.rows_per_step must be a whole number; got '1.5'"),
        ("logging.tensorboard=yes", "logging.tensorboard must be true or false; got 'yes'"),
        ("optimizer=adam", "optimizer must be a table of settings; got 'adam'"),
        ("optimizer.lr", "--set must be name=value, such as optimizer.lr=1e-3; got 'optimizer.lr'"),
        ("model.vocab_size=100", "model.vocab_size must be left to the tokenizer"),
        ("model.hidden_size=63", "model.hidden_size must be a multiple of 2 * num_attention_heads"),
        ("schedule=4_CML", "schedule must have an objective (CLM, MLM, MNTP or MIX) at character 3"),
        ("epochs=3", "epochs must equal the sum of the schedule; got epochs 3"),
        ("precision=int8", "precision must be 'auto', 'float32' or 'bfloat16'; got 'int8'"),
        ("masking.strategy=words", "masking.strategy must be one of token, span"),
        ("evaluation.read_outs=both", "evaluation.read_outs must be among causal, masked, mntp"),
        ("lr_schedule.span=epoch", "lr_schedule.span must be 'run' or 'phase'; got 'epoch'"),
        ("data.row_tokens=4096", "data.row_tokens must be at most model.max_position_embeddings"),
        ("checkpoint.keep=0", "checkpoint.keep must be at least 1; got 0"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(setting, message):
    with pytest.raises(InputError) as caught:
        apply_settings(get_recipe("demo"), [setting])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nearest_names_contain_the_right_one():
    with pytest.raises(InputError, match=r"optimizer\.weight_decay"):
        apply_settings(get_recipe("demo"), ["optimizer.weigth_decay=0"])


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_survives_the_way_through_json(name):
    config = get_recipe(name)
    assert config.name == name
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_every_field_of_every_component_is_a_setting():
    """Nothing in the config can be out of reach of --set, whatever its type."""
    config = get_recipe("demo")
    for section in dataclasses.fields(TrainConfig):
        value = getattr(config, section.name)
        inner = dataclasses.fields(value) if dataclasses.is_dataclass(value) else [None]
        for field in inner:
            name = f"{section.name}.{field.name}" if field else section.name
            current = getattr(value, field.name) if field else value
            text = ",".join(current) if isinstance(current, tuple) else str(current)
            if name != "model.vocab_size":
                assert apply_settings(config, [f"{name}={text}"]) == config, name


def test_config_files_are_read_and_checked(tmp_path):
    toml = tmp_path / "mine.toml"
    toml.write_text('name = "mine"\nschedule = "1_CLM"\n[optimizer]\nlr = 1e-3\nclip_norm = 2\n')
    config = read_config_file(toml)
    assert (config.name, config.optimizer.lr, config.optimizer.clip_norm) == ("mine", 1e-3, 2.0)
    as_json = tmp_path / "mine.json"
    as_json.write_text(json.dumps({"name": "mine", "schedule": "1_CLM", "optimizer": {"lr": 1e-3, "clip_norm": 2}}))
    assert read_config_file(as_json) == config


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "name = ", "config file .*a.toml cannot be read"),
        ("a.json", "[1]", "must hold a table of settings; got list"),
        ("a.json", '{"name": "x"}', "schedule must be given; got none"),
        (
            "a.json",
            '{"name": "x", "schedule": "1_CLM", "optimizer": {"lr": "1"}}',
            "optimizer.lr must be a number; got '1'",
        ),
        ("a.json", '{"name": "x", "schedule": "1_CLM", "seed": true}', "seed must be a whole number; got True"),
        ("a.json", '{"name": "x", "schedule": "1_CLM", "model": {"vocab_size": 9}}', "must be left to the tokenizer"),
    ],
)
def test_a_wrong_config_file_is_one_line(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_config_file(path)


def test_a_missing_config_file_is_named(tmp_path):
    with pytest.raises(InputError, match="nothing.toml does not exist"):
        read_config_file(tmp_path / "nothing.toml")


def test_a_runs_config_json_can_begin_another_run(tmp_path):
    config = get_recipe("demo")
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"config": to_dict(config) | {}, "versions": {}, "data": {}}))
    assert read_config_file(path) == config


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(InputError, match="got 'antlm-babylama', the nearest are antlm-babyllama"):
        get_recipe("antlm-babylama")
