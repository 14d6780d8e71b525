"""What Dagster's pages show of an output beside its numbers: pictures, and the scores as a table."""

import base64
import io
from pathlib import Path
from typing import Any

import dagster as dg

from dod_models import artifact
from dod_pipeline import costs, stages
from dod_pipeline.config import Params

PICTURE_WIDTH = 640  # pixels of a picture in Dagster, which keeps it in its event log
COLUMNS = ("fid", "fid_error", "precision", "recall", "num_samples")  # of the scores' table, where a row has them


def of(params: Params, stage: str, key: str, out: Path) -> dict[str, Any]:
    """The samples' grid, the training's curve and cost, the scores' table, or a sweep's table and picture."""
    if stage == "train":
        return training(params, key)
    if stage == "metrics":
        return {"scores": scores(artifact.read_json(out))}
    if stage == "sweeps":
        picture = stages.paths(params, stage, key)[0]["picture"]
        return {"scores": scores(artifact.read_json(out)), "grid": markdown(picture.read_bytes())}
    grid = out / "grid.png"
    return {"grid": markdown(grid.read_bytes())} if grid.is_file() else {}


def training(params: Params, key: str) -> dict[str, Any]:
    """The curve, and the arithmetic that the training takes."""
    from dod_pipeline import canvas, plots  # late: definitions load without matplotlib

    curve = canvas.png(plots.loss_curve(artifact.read_json(Path("curves", f"{key}.json"))))
    return {"loss curve": markdown(curve), "gflops": costs.training_gflops(params, key)}


def scores(rows: dict[str, dict[str, Any]]) -> dg.TableMetadataValue:
    """A row for each stage and floor."""
    kinds = {"num_samples": "int"}
    columns = [name for name in COLUMNS if any(name in row for row in rows.values())]
    schema = dg.TableSchema([dg.TableColumn("of"), *(dg.TableColumn(n, kinds.get(n, "float")) for n in columns)])
    records = [dg.TableRecord({"of": of, **{name: row.get(name) for name in columns}}) for of, row in rows.items()]
    return dg.MetadataValue.table(records, schema)


def markdown(png: bytes) -> dg.MarkdownMetadataValue:
    """A picture in Markdown, made small."""
    from PIL import Image

    image = Image.open(io.BytesIO(png))
    image.thumbnail((PICTURE_WIDTH, 4 * PICTURE_WIDTH))
    small = io.BytesIO()
    image.save(small, "PNG", optimize=True)
    return dg.MetadataValue.md(f"![picture](data:image/png;base64,{base64.b64encode(small.getvalue()).decode()})")
