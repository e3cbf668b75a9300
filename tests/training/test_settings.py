"""Settings as text: every value reaches its field, every mistake is named with what would have been right."""

import dataclasses
import json

import pytest

from antlm_fast.models import BabyLlamaConfig, GptBertConfig, LtgBertConfig
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
            "batch.length_ramp=128@0.5, 256@0.9",
            "batch.ramp_from=0.25",
            "optimizer.kind=lamb",
            "optimizer.ema_decay=0.99",
            "lr_schedule.warmup_steps=0",
            "lr_schedule.warmup_share=0.1",
            "loss.last_layer_rows=false",
            "data.short_share=0.1",
        ],
    )
    assert config.batch.length_ramp == ("128@0.5", "256@0.9")
    assert config.batch.ramp_from == 0.25
    assert (config.optimizer.kind, config.optimizer.ema_decay) == ("lamb", 0.99)
    assert (config.lr_schedule.warmup_share, config.loss.last_layer_rows, config.data.short_share) == (0.1, False, 0.1)
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
        ("optimizer.kind=sgd", "optimizer.kind must be 'adamw' or 'lamb'; got 'sgd'"),
        ("optimizer.ema_decay=1", "optimizer.ema_decay must be at least 0 and below 1, or none; got 1.0"),
        ("batch.length_ramp=512", "batch.length_ramp must be LENGTH@SHARE texts, such as 512@0.9"),
        ("batch.length_ramp=512@0.9", "batch.length_ramp must have lengths of at most model.max_position_embeddings"),
        ("batch.ramp_from=0", "batch.ramp_from must be above 0"),
        ("data.short_share=2", "data.short_share must lie in 0 .. 1; got 2.0"),
        ("lr_schedule.warmup_share=0.1", "lr_schedule.warmup_steps must be 0 where lr_schedule.warmup_share is given"),
        ("model.architecture=bert", "model.architecture must be one of baby_llama, ltg_bert, gpt_bert; got 'bert'"),
        ("model.position_bucket_size=8", "setting 'model.position_bucket_size' must be a known name; the nearest are"),
        ("data.row_tokens=4096", "data.row_tokens must be at most model.max_position_embeddings"),
        ("checkpoint.keep=0", "checkpoint.keep must be at least 1; got 0"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(setting, message):
    with pytest.raises(InputError) as caught:
        apply_settings(get_recipe("demo"), [setting])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_short_rows_have_no_meaning_where_documents_are_packed():
    with pytest.raises(InputError, match="data.short_share must be 0 where row_mode is 'packed', whose sequences are"):
        apply_settings(get_recipe("demo"), ["data.short_share=0.1", "data.row_mode=packed"])


def test_architecture_chooses_the_class_and_its_defaults():
    config = apply_settings(get_recipe("demo"), ["model.hidden_size=96", "model.architecture=gpt_bert"])
    assert config.model == GptBertConfig(hidden_size=96)
    assert apply_settings(config, ["model.num_hidden_layers=2"]).model == GptBertConfig(
        hidden_size=96, num_hidden_layers=2
    )
    assert apply_settings(config, ["model.architecture=gpt_bert"]) == config  # the same class keeps what it has
    demo = get_recipe("demo")
    assert apply_settings(config, ["model.architecture=baby_llama"]).model == BabyLlamaConfig()
    assert apply_settings(demo, ["model.architecture=baby_llama"]) == demo


def test_unknown_names_are_answered_from_the_class_that_is_meant():
    for settings, wanted, unwanted in (
        (["model.layer_norm=1"], "model.rms_norm_eps", "layer_norm_eps"),
        (["model.architecture=ltg_bert", "model.rms_norm=1"], "model.layer_norm_eps", "rms_norm_eps"),
        (["model.architecture=ltg_bert", "hidden_dropout=0.2"], "model.hidden_dropout", "rope"),
        (["model.architecture=ltg_bert", "model.rope_theta=1"], "model.", "rope_theta,"),
    ):
        with pytest.raises(InputError, match="must be a known name; the nearest are") as caught:
            apply_settings(get_recipe("demo"), settings)
        nearest = str(caught.value).split("the nearest are")[1]
        assert wanted in nearest
        assert unwanted not in nearest


def test_a_file_without_an_architecture_is_a_baby_llama(tmp_path):
    """config.json of runs from before there were others."""
    values = to_dict(get_recipe("antlm-babyllama"))
    del values["model"]["architecture"]
    for section, name in (
        ("batch", "length_ramp"),
        ("batch", "ramp_from"),
        ("optimizer", "kind"),
        ("optimizer", "decay_embeddings"),
        ("optimizer", "ema_decay"),
        ("data", "short_share"),
        ("loss", "last_layer_rows"),
        ("lr_schedule", "warmup_share"),
    ):
        del values[section][name]
    assert from_dict(values) == get_recipe("antlm-babyllama")
    path = tmp_path / "mine.toml"
    path.write_text('name = "mine"\nschedule = "1_MLM"\n[model]\narchitecture = "ltg_bert"\nhidden_size = 96\n')
    assert read_config_file(path).model == LtgBertConfig(hidden_size=96)


@pytest.mark.parametrize("setting", ["optimizer.lrr=1", "model.hiden_size=8", "batch.rows=8", "seeds=1"])
def test_a_suggestion_repeats_a_name(setting):
    with pytest.raises(InputError) as caught:
        apply_settings(TrainConfig(name="x", schedule="1_CLM"), [setting])
    nearest = str(caught.value).split("the nearest are ")[1].split(", ")
    assert len(nearest) == len(set(nearest))


def test_nearest_names_contain_the_right_one():
    with pytest.raises(InputError, match=r"optimizer\.weight_decay"):
        apply_settings(get_recipe("demo"), ["optimizer.weigth_decay=0"])


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_survives_the_way_through_json(name):
    config = get_recipe(name)
    assert config.name == name
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize("recipe", ["demo", "demo-ltgbert", "demo-gptbert"])
def test_every_field_of_every_component_is_a_setting(recipe):
    """Nothing in the config can be out of reach of --set, whatever its type."""
    config = get_recipe(recipe)
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
        ("a.toml", 'model.architecture = ["x"]', "model.architecture must be one of baby_llama, ltg_bert, gpt_bert"),
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
