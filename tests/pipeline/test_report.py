"""The report says what the files say, and needs nothing else."""

import html
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from dod_models import artifact
from dod_pipeline import report, stages, tables
from dod_pipeline.config import load_params

from . import project as tiny
from .project import Project

Enter = Callable[[Project], None]
PAGE = Path("report", "tiny.html")


class Page(HTMLParser):
    """Tags with their attributes, and the text as a reader sees it, white space made single."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source, self.tags, self.parts = source, list[tuple[str, dict[str, str | None]]](), list[str]()
        self.feed(source)
        self.text = re.sub(r"\s+", " ", " ".join(self.parts))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.parts.append(data)


def write() -> Page:
    """The page of the current folder's project, made in this process."""
    report.write(stages.resolve(load_params(), "report", "tiny"))
    return Page(PAGE.read_text())


def change(project: Project, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Change params.yaml by a function of its values."""
    values = yaml.safe_load((project.root / "params.yaml").read_text())
    edit(values)
    project.write_params(values)


@pytest.fixture(scope="module")
def page(shared: Project) -> Page:
    """The page that `dod run` made."""
    return Page((shared.root / PAGE).read_text())


def test_it_holds_every_score_as_shown_elsewhere(shared: Project, page: Page):
    scores = artifact.read_json(shared.root / "metrics" / "tiny" / "tiny-6.json")
    for name, row in scores.items():
        title = tables.NAMES.get(name, name.replace("stage", "stage "))
        shown = " ".join(tables.cell(row, metric, missing="\N{EN DASH}") for metric in tables.METRICS)
        assert f" {title} {shown} 70 " in page.text


def test_it_names_the_digest_of_everything_it_rests_on(shared: Project, page: Page):
    root = shared.root
    files = [root / name / "tiny" / "manifest.json" for name in ("dataset", "reference", "codec", "latents", "train")]
    files += [root / "samples" / "tiny" / "tiny-6" / stage / "manifest.json" for stage in ("stage1", "stage2")]
    files += [root / "metrics" / "tiny" / "tiny-6.json", root / "curves" / "tiny.json"]
    files += [root / "reference" / "tiny" / "extractor.safetensors"]
    files += [root / "train" / "tiny" / "step-6" / "ema-0.9.safetensors"]
    files += [root / "facts" / name / "tiny.json" for name in (*stages.BY_DATASET, "train")]
    for path in files:
        assert artifact.sha256_file(path) in page.text, path
        assert path.relative_to(root).as_posix() in page.text


def test_it_holds_settings_stated_and_defaults_and_their_digests(shared: Project, page: Page, inside: Enter):
    inside(shared)
    params = load_params()
    for stage, key in stages.instances(params, "tiny", until="metrics"):
        assert stages.resolve(params, stage, key).config.digest in page.text
    assert " learning_rate 0.003 " in page.text  # stated
    assert " clip 1.0 " in page.text  # a default
    assert " model.lem.token_width 4 " in page.text
    rows = [row for row in re.findall(r'<tr class="(\w+)"><th scope="row">([\w.]+)</th>', page.source)]
    assert ("stated", "ema_warmup") in rows and ("default", "clip") in rows and ("stated", "model.width") in rows


def test_it_shows_what_each_stage_took_and_the_sum(shared: Project, page: Page):
    total = 0.0
    for address in tiny.STAGES[:-1]:
        (path,) = (shared.root / "history" / "costs" / address).glob("*.json")
        cost = artifact.read_json(path)
        total += cost["seconds"]
        assert f"{address} {cost['seconds']:.1f} {cost['device']} 1 " in page.text
        assert cost["commit"][:10] in page.text
    assert f" together {total:.1f} " in page.text


ENLARGED = {"fid": 1.25, "fid_error": 0.05, "sfid": 2.5, "kid": -0.00012, "precision": 0.5, "recall": 0.25}
COSTS = {"evaluations": 6.0, "gflops_paper": 0.125, "gflops_true": 0.25}


def enlarge() -> None:
    """Give the current project's scores every metric and cost."""
    path = Path("metrics/tiny/tiny-6.json")
    scores = artifact.read_json(path)
    for name in scores:
        scores[name] |= ENLARGED | (COSTS if name.startswith("stage") else {})
    artifact.write_json(path, scores)


def sweep(**more: dict[str, Any]) -> None:
    """Give the current project a sweep's table with a row of each kind, and `more`."""
    row = ENLARGED | COSTS | {"inception_score": 1.5, "num_samples": 70}
    table = {
        "stage1 guidance=1.5 euler steps=2 null=both": row | {"kind": "stage1", "guidance": 1.5, "fid": 7.125},
        "stage2 guidance=1 euler steps=2": row | {"kind": "stage2", "guidance": 1.0, "fid": 6.125},
        "stage3 guidance=2 euler steps=2 null=label": row | {"kind": "stage3", "guidance": 2.0, "fid": 5.125},
        "reconstruction guidance=2 euler steps=2 null=label": COSTS
        | {"kind": "reconstruction", "guidance": 2.0, "rfid": 4.125, "psnr": 12.5, "ssim": 0.75, "num_samples": 60},
        "probe": {"kind": "probe", "top1": 0.875, "num_train": 90, "num_test": 80},
    }
    artifact.write_json(Path("metrics/tiny/tiny-6.sweep.json"), table | more)


def titles(page: Page) -> list[str]:
    """What stands above each figure."""
    return re.findall(r"<figure><h3>(.*?)</h3><img", page.source)


def test_metrics_and_costs_of_the_enlarged_rows_are_shown(own: Project, inside: Enter):
    inside(own)
    enlarge()
    page = write()
    score = artifact.read_json(Path("metrics/tiny/tiny-6.json"))["stage2"]["inception_score"]
    assert f" stage 2 1.250 ± 0.098 2.500 -0.00012 {score:.3f} 0.500 0.250 70 " in page.text
    seconds = [
        artifact.read_json(path)["seconds"]
        for stage in ("stage1", "stage2")
        for path in Path(f"history/costs/{stage}@tiny-6").glob("*.json")
    ]
    assert f" stage 1 6 0.125 0.25 {seconds[0]:.1f} {70 / seconds[0]:.1f} " in page.text
    assert f" stage 2 6 0.125 0.25 {sum(seconds):.1f} {70 / sum(seconds):.1f} " in page.text  # with stage 1's
    shutil.rmtree("history/costs/stage1@tiny-6")
    assert " stage 2 6 0.125 0.25 \N{EN DASH} \N{EN DASH} " in write().text


def test_a_row_made_before_a_metric_has_a_dash_for_it(own: Project, inside: Enter):
    inside(own)
    path = Path("metrics/tiny/tiny-6.json")
    kept = ("fid", "inception_score", "precision", "recall", "num_samples", "evaluations")
    scores = {name: {k: row[k] for k in kept if k in row} for name, row in artifact.read_json(path).items()}
    artifact.write_json(path, scores)
    row, page = scores["stage1"], write()
    assert f" stage 1 {row['fid']:.3f} \N{EN DASH} \N{EN DASH} {row['inception_score']:.3f} " in page.text
    assert f" stage 1 {row['evaluations']:g} \N{EN DASH} \N{EN DASH} " in page.text
    assert "FID against the cost of a sample" not in titles(page)


def test_a_sweep_is_listed_by_kind_and_named_among_the_digests(own: Project, inside: Enter):
    inside(own)
    sweep()
    page = write()
    costs = "6 0.125 0.25"
    numbers = "± 0.098 2.500 -0.00012 1.500 0.500 0.250"
    assert f" stage 1 euler steps=2 null=both 1.5 7.125 {numbers} {costs} " in page.text
    assert f" stage 2 euler steps=2 1 6.125 {numbers} {costs} " in page.text
    assert f" stage 3 euler steps=2 null=label 2 5.125 {numbers} {costs} " in page.text
    assert f" euler steps=2 null=label 2 4.125 12.50 0.750 60 {costs} " in page.text
    assert "(L\u0302): top-1 87.5 % of 80 images, fitted on 90." in page.text
    assert artifact.sha256_file(Path("metrics/tiny/tiny-6.sweep.json")) in page.text
    assert "in params.yaml. What was trained" not in page.text  # nothing more to ask for


def test_a_figure_appears_where_its_rows_do(own: Project, inside: Enter):
    inside(own)
    enlarge()
    sweep()
    always = ["FID by stage and step", "Precision and recall", "FID of each stage"]
    optional = ["FID against the cost of a sample", "FID against guidance"]
    assert titles(write()) == [*always, *optional, "Training loss"]
    change(own, lambda values: values.update(sweeps={}))
    page = write()
    assert titles(page) == [*always, optional[0], "Training loss"]
    assert "ask for them under sweeps in params.yaml" in page.text and "7.125" not in page.text


def test_a_sweep_that_is_asked_for_and_not_made_is_named(own: Project, inside: Enter, page: Page):
    assert "Not swept yet" not in page.text and "The same samples after stages 1 and 2:" in page.text
    inside(own)
    sweep()
    assert "The same samples after stages 1, 2 and 3:" in write().text
    Path("metrics/tiny/tiny-6.sweep.json").unlink()
    page = write()
    assert "Not swept yet: tiny-6." in page.text and "sweeps@tiny-6" not in page.text
    sweep(old={"fid": 1.0})  # a table of before kinds were named
    assert "Not swept yet: tiny-6." in write().text


def test_names_of_a_sweeps_rows_are_only_text(own: Project, inside: Enter):
    inside(own)
    row = ENLARGED | COSTS | {"kind": "stage2", "guidance": 1.5, "inception_score": 1.0, "num_samples": 70}
    sweep(**{'stage2 guidance=1.5 <script>alert("x")</script>&amp;': row})
    page = write()
    assert "<script" not in page.source and '<script>alert("x")</script>&amp;' in page.text


def test_another_experiments_sweep_is_not_this_ones(own: Project, inside: Enter):
    inside(own)
    values = own.params()
    values["experiments"]["other"] = values["experiments"]["tiny"]
    values["checkpoints"]["other-6"] = tiny.CHECKPOINT | {"experiment": "other"}
    values["sweeps"]["other-6"] = values["sweeps"]["tiny-6"] | {"experiment": "other"}
    own.write_params(values)
    assert list(load_params().only("tiny").sweeps) == ["tiny-6"]
    assert list(load_params().only("other").sweeps) == ["other-6"]


def test_it_refers_to_nothing_outside_and_runs_nothing(page: Page):
    assert page.source.startswith("<!DOCTYPE html>")
    assert "<script" not in page.source and "http:" not in page.source and "https:" not in page.source
    for tag, attributes in page.tags:
        assert tag not in ("script", "iframe", "object", "embed", "base")
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "srcset", "action", "data"):
                assert (value or "").startswith("data:"), (tag, name)
    assert "@import" not in page.source and "url(" not in page.source


def test_its_pictures_are_the_grid_and_the_figures(shared: Project, page: Page):
    sources = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    assert sources[0] == report.image(shared.root / "samples/tiny/tiny-6/sweep.png")
    assert [source.split(";")[0] for source in sources[1:]] == ["data:image/svg+xml"] * len(titles(page))
    assert all(attributes.get("alt") for tag, attributes in page.tags if tag == "img")


def test_made_twice_it_is_the_same(own: Project, inside: Enter):
    inside(own)
    enlarge()
    sweep()
    first = write().source
    assert write().source == first


def test_names_are_only_text(own: Project, inside: Enter):
    inside(own)
    name = '/images/<script>alert("x")</script>&amp;'
    change(own, lambda values: values["datasets"]["tiny"]["dataset"].update(root=name))
    page = write()
    assert "<script" not in page.source and html.escape(name, quote=False).replace('"', "&#34;") in page.source
    assert name in page.text


def test_outputs_of_other_settings_are_named(own: Project, inside: Enter, page: Page):
    assert "Made with other settings" not in page.text
    inside(own)
    change(own, lambda values: values["experiments"]["tiny"]["stage2"].update(guidance=4.0))
    notice = "Made with other settings than those that params.yaml has now: stage2@tiny-6. dod run tiny brings"
    assert notice in re.sub(" +([.,])", r"\1", write().text)


def test_a_checkpoint_that_is_not_evaluated_yet_is_named(own: Project, inside: Enter):
    inside(own)
    change(own, lambda values: values["checkpoints"].update({"tiny-4": tiny.CHECKPOINT | {"step": 4}}))
    assert "Not evaluated yet: tiny-4." in write().text


def test_several_checkpoints_are_all_shown_and_the_newest_first(own: Project, inside: Enter):
    inside(own)
    change(own, lambda values: values["checkpoints"].update({"tiny-4": tiny.CHECKPOINT | {"step": 4}}))
    shutil.copytree("samples/tiny/tiny-6", "samples/tiny/tiny-4")
    scores = artifact.read_json(Path("metrics/tiny/tiny-6.json"))
    scores["stage2"]["fid"] = 123.456
    artifact.write_json(Path("metrics/tiny/tiny-4.json"), scores)
    page = write()
    assert "Evaluated at steps 4, 6." in page.text and "Not evaluated" not in page.text
    assert page.text.index("tiny-4, step 4 stage 1") < page.text.index("tiny-6, step 6 stage 1")
    assert "stage 2 123.456 " in page.text
    assert page.text.count("floor: held-out real images") == 1  # the same for both
    pictures = [attributes["alt"] or "" for tag, attributes in page.tags if tag == "img" and "Grid" in str(attributes)]
    assert [re.search(r"tiny-\d", picture)[0] for picture in pictures] == ["tiny-6", "tiny-4"]  # type: ignore[index]
    weights = artifact.sha256_file(Path("train/tiny/step-4/ema-0.9.safetensors"))
    assert weights in page.text


def test_other_floors_and_other_counts_stand_beside_their_own_checkpoint(own: Project, inside: Enter):
    inside(own)
    change(own, lambda values: values["checkpoints"].update({"tiny-4": tiny.CHECKPOINT | {"step": 4}}))
    shutil.copytree("samples/tiny/tiny-6", "samples/tiny/tiny-4")
    scores = artifact.read_json(Path("metrics/tiny/tiny-6.json"))
    artifact.write_json(Path("metrics/tiny/tiny-4.json"), {n: row | {"num_samples": 50} for n, row in scores.items()})
    job = stages.resolve(load_params(), "report", "tiny")
    assert write().text.count("floor: held-out real images") == 2
    both = report.drawn(report.Subject(job))
    Path("metrics/tiny/tiny-4.json").unlink()
    assert both == report.drawn(report.Subject(job))  # a score of 50 images is not drawn beside one of 70
