import layercrit


@layercrit.export_format("names", ["models.txt"])
def names(study, folder):
    """The names of the models, one per line."""
    (folder / "models.txt").write_text("".join(f"{name}\n" for name in study.models["model"]), encoding="utf-8")
