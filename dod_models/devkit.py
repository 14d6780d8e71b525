"""ImageNet's development kit, which says the class of each image in the official validation archive."""

import io
import tarfile
from pathlib import Path

TRUTH = "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"
SYNSETS = "ILSVRC2012_devkit_t12/data/meta.mat"


def validation_classes(devkit: Path) -> list[str]:
    """WordNet ids of the validation images in the order of their names; ValueError if this is no such kit."""
    import scipy.io

    try:
        with tarfile.open(devkit) as tar:
            truth, meta = (file.read() for name in (TRUTH, SYNSETS) if (file := tar.extractfile(name)))
        synsets = scipy.io.loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        names = {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in synsets}
        return [names[int(number)] for number in truth.split()]
    except (OSError, tarfile.TarError, KeyError, ValueError, EOFError) as error:
        raise ValueError(
            f"{devkit}: not the development kit of ILSVRC2012, tasks 1 and 2 ({type(error).__name__}: {error}); "
            "download it again"
        ) from None
