"""Where the images of a data set lie: ImageNet's layout, as folders or as the tar archives that ImageNet comes in.

ROOT/SPLIT/CLASS/NAME.JPEG, or ROOT/SPLIT/CLASS.tar with the images of a class, splits `train` and `val`. In place of
ROOT/train the official archive of all classes' archives may lie in ROOT; in place of ROOT/val the official archive of
the validation images and the development kit, which says their classes.
"""

from pathlib import Path, PurePosixPath

from tqdm import tqdm

from dod_models import archive, devkit
from dod_models.images import Place

SPLITS = ("train", "val")
SUFFIXES = {".png", ".jpg", ".jpeg"}
EXPECTED = "expected ImageNet's layout ROOT/train/CLASS/NAME.png, or ROOT/train/CLASS.tar"
TRAIN, VAL, KIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"

Classes = dict[str, list[Place]]  # images by class, both in sorted order


def is_image(name: str) -> bool:
    """Whether a file is called an image."""
    return PurePosixPath(name).suffix.lower() in SUFFIXES


def belongs(name: str) -> bool:
    """Whether a file of this path below ROOT is part of a data set."""
    return name in (TRAIN, VAL, KIT) or PurePosixPath(name).parts[0] in SPLITS


def images_in(path: Path, *, root: Path, start: int = 0, end: int | None = None) -> list[Place]:
    """The images of an archive, or of the archive in bytes `start` to `end` of a file, by name."""
    found = sorted(m for m in archive.members(path, start=start, end=end) if is_image(m.name))
    return [Place(path.relative_to(root).as_posix(), *member) for member in found]


def class_of(path: Path, *, root: Path) -> list[Place]:
    """The images of a class, from its folder or its archive."""
    if path.suffix == ".tar":
        return images_in(path, root=root)
    names = sorted(p.name for p in path.iterdir() if is_image(p.name))
    return [Place(f"{path.relative_to(root).as_posix()}/{name}") for name in names]


def in_split(root: Path, split: str) -> Classes:
    """The classes of ROOT/SPLIT."""
    paths: dict[str, Path] = {}
    folder = root / split
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.is_dir() or path.suffix == ".tar":
            other = paths.setdefault(path.name if path.is_dir() else path.stem, path)
            if other != path:
                raise ValueError(f"{other} and {path}: a folder and an archive of one class; remove one of them")
    bar = tqdm(sorted(paths), desc=f"list {split}", unit="class")
    return {name: class_of(paths[name], root=root) for name in bar}


def in_train_archive(path: Path, *, root: Path) -> Classes:
    """The classes of the official train archive, which holds an archive CLASS.tar of each."""
    inner = sorted(m for m in archive.members(path) if m.name.endswith(".tar"))
    bar = tqdm(inner, desc=f"list {path.name}", unit="class")
    return {PurePosixPath(m.name).stem: images_in(path, root=root, start=m.offset, end=m.offset + m.size) for m in bar}


def in_val_archive(path: Path, *, root: Path) -> Classes:
    """The classes of the official validation archive, by the development kit beside it."""
    if not (root / KIT).is_file():
        raise ValueError(f"{path}: its classes stand in {KIT}, which is not beside it; put it there")
    images, names = images_in(path, root=root), devkit.validation_classes(root / KIT)
    if len(images) != len(names):
        raise ValueError(f"{path}: has {len(images)} images, {root / KIT} has {len(names)}; download them again")
    found: Classes = {}
    for image, name in zip(images, names, strict=True):
        found.setdefault(name, []).append(image)
    return found


def find(root: Path) -> dict[str, Classes]:
    """The images of both splits; ValueError that names what is missing, superfluous or contradictory."""
    found: dict[str, Classes] = {}
    for split, name, read in (("train", TRAIN, in_train_archive), ("val", VAL, in_val_archive)):
        official = root / name
        if official.is_file() and (root / split).is_dir():
            raise ValueError(f"{official} and {root / split}: two {split} splits; move one of them away")
        if split == "train" and not official.is_file() and not (root / split).is_dir():
            raise ValueError(
                f"{root}: no folder `train`; {EXPECTED}; put the images there, or set dataset.root in params.yaml"
            )
        found[split] = read(official, root=root) if official.is_file() else in_split(root, split)
    check(root, found)
    return {split: dict(sorted(classes.items())) for split, classes in found.items()}


def check(root: Path, found: dict[str, Classes]) -> None:
    """ValueError unless both splits have images of the same classes."""
    train = found["train"].keys()
    if not train:
        raise ValueError(f"{root}/train: no class folders; {EXPECTED}")
    strange = found["val"].keys() - train
    if strange:
        raise ValueError(
            f"{root}/val: classes without training images: {', '.join(sorted(strange))}; remove or add them"
        )
    lacking = [f"{split}/{name}" for split in SPLITS for name in sorted(train) if not found[split].get(name)]
    if lacking:
        raise ValueError(f"{root}/{lacking[0]}: no images; remove the class from every split or add images to it")
