from dod_models import artifact, source


def test_the_key_of_work_is_another_for_other_settings_inputs_code_or_torch(tmp_path, monkeypatch):
    package, data = tmp_path / "package", tmp_path / "data"
    for path in (package / "source.py", package / "other.py", data / artifact.MANIFEST):
        path.parent.mkdir(exist_ok=True)
        path.write_text("1")
    monkeypatch.setattr(source, "__file__", str(package / "source.py"))
    keys = [source.key("config", [data]), source.key("other", [data])]
    (data / artifact.MANIFEST).write_text("2")
    keys.append(source.key("config", [data]))
    (package / "other.py").write_text("2")
    keys.append(source.key("config", [data]))
    monkeypatch.setattr("torch.__version__", "another")
    keys.append(source.key("config", [data]))
    assert len(set(keys)) == 5
    assert source.key("config", [data]) == keys[-1]
