"""Reports of made-up run folders: what they say, that they are well-formed, escaped and reproducible."""

from __future__ import annotations

import json
import re
import struct
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from antlm_fast.report import numbers, write_report
from antlm_fast.report.plots import draw_svg
from antlm_fast.report.run_record import read_run
from antlm_fast.types import InputError

VOID = {"meta", "wbr", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Collects the visible text, tags and ids; complains where an element is closed that is not open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name in ("src", "href", "action"):
                self.links.append(str(value))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.words.append(data)


def table(accuracies: dict[str, float], field: str = "syntax") -> dict[str, Any]:
    mean = sum(accuracies.values()) / len(accuracies)
    return {
        "overall": mean,
        "by_uid": {uid: {"accuracy": share, "num_pairs": 10, "field": field} for uid, share in accuracies.items()},
        "by_field": {field: {"accuracy": mean, "num_pairs": 10 * len(accuracies)}},
    }


def make_run(
    folder: Path,
    phases: list[tuple[str, str, int]],
    *,
    done: int | None = None,
    name: str = "demo",
    masked: str = "MLM",
    model: bool = True,
    pairs: dict[str, Any] | None = None,
) -> Path:
    """A run folder whose validation losses are 10 - step / 100 (CLM) and 9 - step / 100 (masked)."""
    folder.mkdir()
    ends = [sum(steps for _, _, steps in phases[: index + 1]) for index in range(len(phases))]
    header = [
        {"name": phase, "objective": objective, "first_step": end - steps, "end_step": end}
        for (phase, objective, steps), end in zip(phases, ends, strict=True)
    ]
    done = ends[-1] if done is None else done
    lines: list[dict[str, Any]] = [
        {"kind": "run", "total_steps": ends[-1], "steps_per_epoch": 20, "phases": header},
    ]
    for step in range(0, done + 1, 10):
        phase = next(index for index, end in enumerate(ends) if step <= end)
        objective = phases[phase][1]
        at = {"step": step, "phase": phase, "epoch": step / 20}
        losses = {"CLM": 10 - step / 100, masked: 9 - step / 100}
        if step > 0:
            trained = {key: losses[key] for key in losses if key in objective or objective.startswith("MIX")}
            rate = None if objective == "CLM" else 0.15
            lines.append(
                {
                    "kind": "train",
                    **at,
                    "objective": objective,
                    "loss": trained,
                    "lr": 0.0003,
                    "mask_rate": rate,
                    "grad_norm": 1.0,
                    "tokens": 4096 * step,
                }
            )
        lines.append({"kind": "validation", **at, "loss": losses})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    speeds = (20000.0, 23456.0, 90000.0)
    (folder / "throughput.jsonl").write_text(
        "".join(json.dumps({"step": 10, "tokens_per_second": speed, "seconds": 1.0}) + "\n" for speed in speeds)
    )
    config = {
        "config": {
            "name": name,
            "schedule": "+".join(phase for phase, _, _ in phases),
            "model": {"hidden_size": 24, "num_hidden_layers": 2},
            "data": {"train": "builtin"},
        },
        "versions": {"torch": "2.99.1", "python": "3.11.7"},
        "data": {"train": {"fingerprint": "abc123" * 8, "num_tokens": 1234567, "num_documents": 4321}},
    }
    (folder / "config.json").write_text(json.dumps(config))
    if model:
        (folder / "model").mkdir()
        architecture = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 24}
        (folder / "model" / "config.json").write_text(json.dumps(architecture | {"num_hidden_layers": 2}))
        tensors = {
            "__metadata__": {"format": "pt"},
            "a": {"dtype": "F32", "shape": [300, 24], "data_offsets": [0, 28800]},
            "b": {"dtype": "F32", "shape": [34], "data_offsets": [28800, 28936]},
        }
        content = json.dumps(tensors).encode()
        (folder / "model" / "model.safetensors").write_bytes(struct.pack("<Q", len(content)) + content)
    if pairs is not None:
        (folder / "minimal_pairs.json").write_text(
            json.dumps({"source": "builtin", "num_pairs": 20, "chance": 0.5, "read_outs": pairs})
        )
    return folder


ANTLM = [("1_CLM", "CLM", 20), ("2_MLM", "MLM", 40), ("1_CLM", "CLM", 20)]
PAIRS = {
    "causal": {
        "sum": table({"agreement": 0.9, "islands": 0.43}),
        "mean": table({"agreement": 0.7, "islands": 0.5}),
    },
    "masked": {
        "sum": table({"agreement": 0.8, "islands": 0.61}),
        "mean": table({"agreement": 0.8, "islands": 0.62}),
    },
}

RUNS: dict[str, dict[str, Any]] = {
    "finished": {"phases": ANTLM, "pairs": PAIRS},
    "no pairs": {"phases": ANTLM},
    "unfinished": {"phases": ANTLM, "done": 30, "model": False},
    "not started": {"phases": ANTLM, "done": -1, "model": False},
    "first measurement only": {"phases": ANTLM, "done": 0, "model": False},
    "one phase": {"phases": [("3_CLM", "CLM", 60)]},
    "24 phases": {"phases": [("1_CLM", "CLM", 20), ("1_MLM", "MLM", 20)] * 12},
    "72 phases": {"phases": [("1_CLM", "CLM", 20), ("1_MLM", "MLM", 20)] * 36},
    "steps and MNTP": {"phases": [("20s_CLM", "CLM", 20), ("80s_MNTP", "MNTP", 80)], "masked": "MNTP"},
    "mixed": {"phases": [("6_MIX(0.9375)", "MIX(0.9375)", 120)]},
    "mixed with MNTP": {"phases": [("6_MIX(0.9375,MNTP)", "MIX(0.9375,MNTP)", 120)], "masked": "MNTP"},
    "other mask": {"phases": [("1_CLM", "CLM", 20), ("16_MLM@causal", "MLM@causal", 320)]},
}


@pytest.mark.parametrize("kind", list(RUNS))
def test_every_kind_of_run_has_a_report(tmp_path: Path, kind: str) -> None:
    folder = make_run(tmp_path / "run", **RUNS[kind])
    written = write_report(folder)
    cards = [folder / "model" / "README.md"] if RUNS[kind].get("model", True) else []  # where the Hub reads it
    assert written == [*cards, folder / "loss.png", folder / "report.html"]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    html = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    for phase, _, _ in RUNS[kind]["phases"]:
        assert phase in page.text
    assert len(page.ids) == len(set(page.ids))
    assert [link for link in page.links if not link.startswith("#")] == []
    assert "http" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", html)
    assert ("nan" in page.text.lower().split(), "None" in page.text) == (False, False)
    for path in cards:
        card = path.read_text(encoding="utf-8")
        assert "+".join(phase for phase, _, _ in RUNS[kind]["phases"]) in card
        assert "None" not in card


def test_the_page_says_the_numbers_of_the_run(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", ANTLM, pairs=PAIRS)
    write_report(folder)
    text = Page((folder / "report.html").read_text(encoding="utf-8")).text
    for fragment in (
        "Parameters 7,234 2 layers, hidden size 24",  # 300 * 24 + 34
        "Tokens seen 327.7 k 80 of 80 steps",  # 4096 * 80
        "CLM loss 9.200 validation; perplexity 9,897.1",
        "MLM loss 8.200 validation; perplexity 3,641.0",
        "Minimal pairs, best 71.0 % read out masked, mean; chance 50 %",
        "23,456 tokens per second, median of 3 measurements, measured on this machine",
        "1_CLM CLM 0–20 10.000 → 9.800 9.000 → 8.800",
        "2_MLM MLM 20–60 9.800 → 9.400 8.800 → 8.400",
        "causal 66.5 60.0 masked 70.5 71.0",
        "agreement 90.0 80.0 islands 43.0 61.0",
        "torch 2.99.1",
        "train 1.2 M 4,321 abc123abc123abc1",
    ):
        assert fragment in text


def test_the_model_card_says_the_numbers_and_how_to_load(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", ANTLM, pairs=PAIRS)
    write_report(folder)
    card = (folder / "model" / "README.md").read_text(encoding="utf-8")
    assert card.startswith('---\nmodel_name: "demo"\nlibrary_name: transformers\npipeline_tag: text-generation\n')
    for fragment in (
        "| parameters | 7,234 |",
        "| layers | 2 |",
        "Schedule: `1_CLM+2_MLM+1_CLM`. Trained for 80 of 80 steps, 327.7 k tokens seen.",
        "Training data: `builtin`, 1.2 M tokens.",
        "| CLM | 9.200 | 9,897.1 |",
        "| masked | 70.5 % | 71.0 % |",
        "causal = AutoModelForCausalLM.from_pretrained(folder)",
        'masked = AutoModelForMaskedLM.from_pretrained(folder, subfolder="masked")',
        "fill(model, gap, tokenizer.mask_id, banned_ids=special)",
    ):
        assert fragment in card


@pytest.mark.parametrize("kind", ["steps and MNTP", "mixed with MNTP"])
def test_the_card_of_an_mntp_run_reads_the_position_before_the_mask(tmp_path: Path, kind: str) -> None:
    folder = make_run(tmp_path / "run", **RUNS[kind])
    write_report(folder)
    card = (folder / "model" / "README.md").read_text(encoding="utf-8")
    assert "tokenizer.mask_id, shift=1," in card
    assert "a hidden token's logits are those of the position before it" in card


def test_the_card_of_a_run_that_ends_with_mlm_reads_the_mask_itself(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", phases=[("1_MNTP", "MNTP", 20), ("1_MLM", "MLM", 20), ("1_CLM", "CLM", 20)])
    write_report(folder)
    card = (folder / "model" / "README.md").read_text(encoding="utf-8")
    assert "fill(model, gap, tokenizer.mask_id, banned_ids" in card
    assert "position before it" not in card


def test_the_card_of_an_exported_bert_loads_its_own_code(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", **RUNS["mixed"])
    path = folder / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "antlm_bert", "architectures": ["X"]}))
    write_report(folder)
    card = (folder / "model" / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: text-generation" in card
    assert "by masked language modelling, both in every batch, with" in " ".join(card.split())
    assert 'AutoModelForMaskedLM.from_pretrained(folder, subfolder="masked", trust_remote_code=True)' in card
    assert "LlamaForCausalLM" not in card


@pytest.mark.parametrize(
    ("objectives", "said", "tags", "task"),
    [
        (["CLM"], "by causal language modelling with `antlm_fast`: it was never trained to fill gaps.", "causal-lm", 0),
        (["MLM"], "by masked language modelling with `antlm_fast`: it was never trained to continue", "masked-lm", 1),
        (["MNTP"], "by masked next-token prediction with `antlm_fast`: it was never", "masked-lm", 1),
        (
            ["CLM", "MLM", "CLM"],
            "by causal language modelling and by masked language modelling, in turns, with `antlm_fast`: the same",
            "antlm causal-lm masked-lm",
            0,
        ),
        (
            ["CLM", "MLM@causal"],
            "by causal language modelling and by masked language modelling under the causal mask, in turns, with",
            "antlm causal-lm masked-lm",
            0,
        ),
        (
            ["MIX(0.9375,MNTP)"],
            "by causal language modelling and by masked next-token prediction, both in every batch, with `antlm_fast`",
            "antlm causal-lm masked-lm",
            0,
        ),
        (["MIX(1)"], "by masked language modelling with `antlm_fast`: it was never", "masked-lm", 1),
    ],
)
def test_the_card_says_what_a_run_was_trained_by_and_no_more(
    tmp_path: Path, objectives: list[str], said: str, tags: str, task: int
) -> None:
    yaml = pytest.importorskip("yaml")
    name = 'a "name": \U0001f600 \x7f\x85 #1'
    folder = make_run(tmp_path / "run", [(f"1_{each}", each, 20) for each in objectives], name=name)
    write_report(folder)
    _, front, text = (folder / "model" / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    assert f"One transformer trained {said}" in text
    assert yaml.safe_load(front) == {
        "model_name": 'a "name": \U0001f600    #1',
        "library_name": "transformers",
        "pipeline_tag": ["text-generation", "fill-mask"][task],
        "tags": tags.split(),
    }


def test_an_unfinished_run_says_so_and_leaves_out_what_is_not_there(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", ANTLM, done=30, model=False)
    (folder / "config.json").unlink()
    (folder / "throughput.jsonl").unlink()
    write_report(folder)
    text = Page((folder / "report.html").read_text(encoding="utf-8")).text
    assert "30 of 80 steps, unfinished" in text
    assert "Parameters –" in text
    assert "2_MLM MLM 20–60 9.800 → 9.700 8.800 → 8.700" in text
    assert "1_CLM CLM 60–80 – → – – → –" in text
    assert ("Minimal pairs" in text, "Throughput" in text, "Configuration" in text) == (False, False, False)
    assert not (folder / "README.md").exists()


def test_text_of_the_run_is_escaped(tmp_path: Path) -> None:
    hostile = "</script><img src=x onerror=alert(1)>&|`"
    pairs = {"causal": {"sum": table({hostile: 0.5}, hostile), "mean": table({hostile: 0.5}, hostile)}}
    folder = make_run(tmp_path / "run", [(hostile, "CLM", 20)], name=hostile, pairs=pairs)
    write_report(folder)
    html = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert "<img" not in html
    assert "img" not in page.tags
    assert page.tags.count("script") == 2
    assert page.text.count(hostile) >= 5
    readings = re.search(r'id="measurements">(.*?)</script>', html, flags=re.DOTALL)
    assert readings is not None
    assert hostile in json.loads(readings.group(1))[0][1]
    card = (folder / "model" / "README.md").read_text(encoding="utf-8")
    assert "# \\</script\\>\\<img src=x onerror=alert(1)\\>&\\|\\`" in card
    assert f"model_name: {json.dumps(hostile)}" in card


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    contents = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        make_run(folder, ANTLM, pairs=PAIRS)
        contents.append([path.read_bytes() for path in write_report(folder)])
    again = [path.read_bytes() for path in write_report(tmp_path / "a")]
    assert contents[0] == contents[1] == again


def test_switches_and_curves_are_where_the_page_says_they_are(tmp_path: Path) -> None:
    record = read_run(make_run(tmp_path / "run", ANTLM))
    picture = draw_svg(record, 9.6, "wide")
    left, right = picture.left, picture.right
    assert (picture.width, left, right) == (pytest.approx(691.2), 36.0, pytest.approx(631.2))
    assert 0 < picture.top < picture.bottom < picture.height
    # the switch at step 20 of 80 is drawn a quarter of the way along the axis
    assert f"M {left + 0.25 * (right - left):g} " in picture.svg
    assert picture.svg.count(">2_MLM</text>") == 1


def test_a_line_that_was_cut_off_and_a_step_measured_twice(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", ANTLM, done=30)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "validation", "step": 30, "phase": 1, "loss": {"CLM": 1.5, "MLM": 2.5}}\n{"kind": "tra')
    record = read_run(folder)
    assert [line["step"] for line in record.validation] == [0, 10, 20, 30]
    assert record.final_losses == {"CLM": 1.5, "MLM": 2.5}
    assert record.tokens_seen == 4096 * 30


@pytest.mark.parametrize(
    ("file", "content", "fragment"),
    [
        ("metrics.jsonl", '{"kind": "run"\n{}\n', "metrics.jsonl, line 1: not JSON: "),
        ("metrics.jsonl", "[]\n", "metrics.jsonl, line 1: must be a JSON object; got []"),
        ("metrics.jsonl", '{"kind": "train", "step": 1}\n', "metrics.jsonl: no line of kind 'run'"),
        ("metrics.jsonl", '{"kind": "run", "phases": []}\n', "key 'total_steps' is missing in metrics.jsonl"),
        ("config.json", "{", "config.json, line 1: not JSON: "),
        ("config.json", "3", "config.json: must hold a JSON object; got int"),
        ("model/model.safetensors", "short", "model.safetensors: not a safetensors file"),
    ],
)
def test_a_malformed_file_is_named(tmp_path: Path, file: str, content: str, fragment: str) -> None:
    folder = make_run(tmp_path / "run", ANTLM)
    (folder / file).write_text(content)
    with pytest.raises(InputError) as error:
        write_report(folder)
    assert fragment in str(error.value)


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no metrics\.jsonl: this is no run folder"):
        write_report(tmp_path)
    with pytest.raises(InputError, match=r"run folder must exist; got .*nowhere"):
        write_report(tmp_path / "nowhere")


def test_without_matplotlib_the_way_to_get_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run(tmp_path / "run", ANTLM)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError) as error:
        write_report(folder)
    assert str(error.value) == "the report needs matplotlib: pip install '.[train]' in antlm_fast's checkout"
    assert (folder / "model" / "README.md").is_file()


def test_losses_that_are_not_finite_are_drawn_and_said(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", ANTLM, done=30)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 40, "phase": 1, "loss": {"MLM": NaN}, "lr": 0.1, "tokens": 1}\n')
        file.write('{"kind": "validation", "step": 40, "phase": 1, "loss": {"CLM": NaN, "MLM": Infinity}}\n')
    write_report(folder)
    text = Page((folder / "report.html").read_text(encoding="utf-8")).text
    assert "CLM loss nan validation; perplexity –" in text
    assert "MLM loss inf validation; perplexity above 10⁸" in text


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (numbers.count(None), "–"),
        (numbers.count(999), "999"),
        (numbers.count(12345), "12,345"),
        (numbers.count(123456), "123.5 k"),
        (numbers.count(58_340_000), "58.3 M"),
        (numbers.count(1.25e9), "1.2 B"),
        (numbers.rate(0.0003), "3e-4"),
        (numbers.rate(0.000125), "1.25e-4"),
        (numbers.rate(0.000298, digits=2), "3e-4"),
        (numbers.rate(0.0), "0"),
        (numbers.percent(0.8125), "81.2 %"),
        (numbers.perplexity(0.0), "1.0"),
    ],
)
def test_numbers_are_written_for_people(written: str, expected: str) -> None:
    assert written == expected
