"""Names, arguments and defaults are the original's."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import keras
import pytest

import kconv.cai as cai

DESCRIPTION = Path(__file__).parents[1] / "data" / "cai_api.md"

# What the original has beyond its models, layers and described tools.
LEFT_OUT = {
    "layers": """BinaryConvLayers BinaryPointwiseConvLayers BinaryCompressionLayer
        BinaryCompression""",
    "efficientnet": """correct_pad block kblock kblockLastName AddkEfficientNetPath
        AddkEfficientNetParallelBlocks AddkEfficientNetOtherBlocks preprocess_input""",
    "mobilenet": "_conv_block _depthwise_conv_block kconv_block kdepthwise_conv_block",
    "mobilenet_v3": """correct_pad _depth _se_block _inverted_res_block MobileNetV3 kse_block
        kinverted_res_block kMobileNetV3""",
    "densenet": """kdensenet_conv_block densenet_conv_block kdensenet_block densenet_block
        kdensenet_transition_block densenet_transition_block densenet_transition_block_paths
        big_densenet two_paths_densenet two_paths_big_densenet""",
    "inception_v3": """kInceptionPointwise create_inception_v3_mixed_layer create_inception_path
        create_inception_v3_two_path_mixed_layer compiled_full_two_path_inception_v3
        compiled_inception_v3 compiled_two_path_inception_v3""",
    "datasets": """rgb2lab rotate motion_blur occlusion occlusion_a motion_blur_a rgb2lab_a
        skimage_rgb2lab_a cv2_resize_a skimage_blur salt_pepper img_folder_dataset
        Create2DGaussian Create2DGaussianWithChannels print_cifar10_result bgr_to_rgb_a
        bgr_to_rgb fix_bad_tfkeras_channel_order fix_img_bad_tfkeras_channel_order
        download_file unzip_file download_zip_and_extract slice_image slice_images
        create_pixel_array_from_3D_image create_pixel_array_from_3D_images
        create_3D_image_from_pixel_array create_image_generator_sliced_image
        load_image_file_names_from_folder flip_images_on_folder rgb_to_black_white_a
        clone_sub_folders extract_subset_every""",
    "models": """save_model load_model plant_leaf compiled_inception_v3
        compiled_two_path_inception_v3 create_paths two_path_inception_v3""",
    "util": """save_2d_array_as_csv slice_3d_into_2d_cl slice_4d_into_3d_cl
        show_neuronal_patterns_nf preprocess preprocess_cp deprocess deprocess_cp
        rgb2monopolar rgb2bipolar rgb2monopolar_lab rgb2bipolar_lab
        rgb2black_white_25percent rgb2black_white_50percent rgb2black_white_75percent
        get_max_acceptable_common_divisor""",
    "gradientascent": "",
}


def described() -> list[tuple[str, str, str]]:
    """(module, name, the line that describes it) of everything in the description."""
    module, items, in_code = "", [], False
    for line in DESCRIPTION.read_text("utf-8").splitlines():
        if line.startswith("## "):
            module = line[3:]
        elif line == "```":
            in_code = not in_code
        elif in_code:
            items.append((module, line.removeprefix("class ").partition("(")[0], line))
    return items


ITEMS = described()
OFFERED = [item for item in ITEMS if item[1] not in LEFT_OUT[item[0]].split()]


def test_every_function_is_there_or_listed_as_left_out() -> None:
    assert len(ITEMS) > 200
    for module, names in LEFT_OUT.items():
        known = {name for where, name, _ in ITEMS if where == module}
        assert set(names.split()) <= known
        assert not [name for name in names.split() if hasattr(getattr(cai, module), name)]


@pytest.mark.parametrize(("module", "name", "line"), OFFERED, ids=lambda value: value[:40])
def test_signature(module: str, name: str, line: str) -> None:
    namespace = getattr(cai, module)
    function = ast.parse(f"def {line.removeprefix('class ')}: pass").body[0]
    assert isinstance(function, ast.FunctionDef)
    arguments = function.args
    expected = {argument.arg: inspect.Parameter.empty for argument in arguments.args}
    for argument, default in zip(
        reversed(arguments.args), reversed(arguments.defaults), strict=False
    ):
        code = compile(ast.Expression(default), "default", "eval")
        expected[argument.arg] = eval(code, {"keras": keras, "cai": cai, **vars(namespace)})
    if arguments.kwarg:
        expected[arguments.kwarg.arg] = inspect.Parameter.empty
    expected.pop("self", None)
    parameters = inspect.signature(getattr(namespace, name)).parameters
    added = inspect.Parameter.KEYWORD_ONLY  # the original has none
    found = {p.name: p.default for p in parameters.values() if p.kind != added}
    if isinstance(getattr(namespace, name), type):
        found.pop("data_format", None)  # which the original leaves to **kwargs
    assert list(found.items()) == list(expected.items())
