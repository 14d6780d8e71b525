import pickle

import numpy as np
import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from dod_models import artifact, inception
from dod_models.codec import device
from dod_models.inception import Inception, find_weights, read_weights

IMAGES = np.random.default_rng(0).integers(0, 256, size=(2, 64, 64, 3), dtype=np.uint8)
BEFORE_6D = (
    *("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2"),
    *("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c"),
)


@pytest.fixture(scope="module")
def extractor(inception_weights):
    digest = artifact.sha256_file(inception_weights)
    return Inception(read_weights(inception_weights, sha256=digest), digest)


@pytest.fixture(scope="module")
def theirs(inception_weights):
    return FeatureExtractorInceptionV3("theirs", ["2048", "logits_unbiased"], str(inception_weights)).to(device())


@pytest.fixture(scope="module")
def found(extractor):
    return extractor([IMAGES])


def test_the_weights_are_those_that_torch_fidelity_would_fetch():
    assert inception.URL == URL_INCEPTION_V3


def test_pooled_features_and_logits_are_torch_fidelity_s_of_the_same_weights(found, theirs):
    with torch.inference_mode():
        features, logits = theirs(torch.from_numpy(IMAGES).permute(0, 3, 1, 2).to(device()))
    assert torch.equal(found.features, features.cpu()) and torch.equal(found.logits, logits.cpu())
    assert found.features.shape == (2, 2048) and found.logits.shape == (2, 1008)
    assert found.features.std(dim=0).max() > 0.01  # the images differ


def test_spatial_features_are_seven_channels_of_the_1x1_branch_after_its_relu_place_by_place(found, theirs):
    with torch.inference_mode():
        x = torch.from_numpy(IMAGES).permute(0, 3, 1, 2).to(device()).float()
        x = (interpolate_bilinear_2d_like_tensorflow1x(x, size=(299, 299), align_corners=False) - 128) / 128
        for name in BEFORE_6D:
            x = theirs.get_submodule(name)(x)
        maps = theirs.get_submodule("Mixed_6d.branch1x1")(x).cpu()
    assert maps.shape == (2, 192, 17, 17)
    expected = maps.numpy().transpose(0, 2, 3, 1)[..., :7].reshape(2, 2023)
    assert np.array_equal(found.spatial.numpy(), expected)
    assert expected.min() == 0 and expected.std() > 0


def test_grey_images_are_repeated_to_three_channels(extractor):
    grey = IMAGES[:1, :, :, :1]
    for mine, repeated in zip(extractor([grey]), extractor([np.repeat(grey, 3, axis=3)]), strict=True):
        assert torch.equal(mine, repeated)


def test_tf32_is_off_inside_and_as_before_outside(extractor):
    cudnn, matmul, inside = torch.backends.cudnn, torch.backends.cuda.matmul, []
    before = cudnn.allow_tf32, matmul.allow_tf32
    handle = extractor.net.register_forward_hook(lambda *_: inside.append((cudnn.allow_tf32, matmul.allow_tf32)))
    cudnn.allow_tf32 = matmul.allow_tf32 = True
    try:
        extractor([IMAGES[:1]])
        after = cudnn.allow_tf32, matmul.allow_tf32
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before
        handle.remove()
    assert (inside, after) == ([(False, False)], (True, True))


def test_weights_are_found_as_a_file_in_a_folder_and_in_torch_hub_s_cache(inception_weights, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert find_weights(str(inception_weights)) == inception_weights
    assert find_weights(str(inception_weights.parent)) == inception_weights
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    (cache / inception.WEIGHTS).touch()
    assert find_weights(None) == cache / inception.WEIGHTS


@pytest.mark.parametrize("path", [None, "weights", "weights.pth"])
def test_where_they_lack_the_error_says_whence_they_come_and_where_to_put_them(tmp_path, monkeypatch, path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "weights").mkdir()
    with pytest.raises(FileNotFoundError) as error:
        find_weights(None if path is None else str(tmp_path / path))
    for said in (inception.URL, str(tmp_path / "hub/checkpoints" / inception.WEIGHTS), "reference.weights", "s3://"):
        assert said in str(error.value)


def test_weights_of_another_digest_are_refused_unopened(tmp_path):
    (tmp_path / inception.WEIGHTS).write_bytes(b"no pickle")
    with pytest.raises(ValueError, match=rf"expected {inception.SHA256}: these are other weights"):
        read_weights(tmp_path / inception.WEIGHTS, sha256=inception.SHA256)


class Evil:
    def __reduce__(self):
        return (exit, ())


def test_nothing_that_a_file_says_is_executed(tmp_path):
    torch.save({"weights": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(pickle.UnpicklingError):
        read_weights(tmp_path / "evil.pth", sha256=artifact.sha256_file(tmp_path / "evil.pth"))


def test_the_published_file_s_name_states_its_digest():
    assert f"weights-inception-2015-12-05-{inception.SHA256[:8]}.pth" == inception.WEIGHTS
