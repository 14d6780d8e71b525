from pathlib import Path

from dod_models import artifact, source


def fresh(config: str, inputs: list[Path]) -> str:
    """The key that another process would give."""
    source.code.cache_clear()
    return source.key("other", config, inputs)


def test_the_key_of_work_is_another_for_other_settings_inputs_code_or_torch(tmp_path, monkeypatch):
    package, data = tmp_path / "package", tmp_path / "data"
    for path in (package / "source.py", package / "other.py", data / artifact.MANIFEST):
        path.parent.mkdir(exist_ok=True)
        path.write_text("1")
    monkeypatch.setattr(source, "__file__", str(package / "source.py"))
    keys = [fresh("config", [data]), fresh("other", [data])]
    (data / artifact.MANIFEST).write_text("2")
    keys.append(fresh("config", [data]))
    (package / "other.py").write_text("2")
    keys.append(fresh("config", [data]))
    monkeypatch.setattr("torch.__version__", "another")
    keys.append(fresh("config", [data]))
    assert len(set(keys)) == 5
    assert fresh("config", [data]) == keys[-1]
