import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from kaf_model.figures import CLASS_COLOURS, segmentation_contours

CLASSES = {1: "ventricle", 4: "myocardium"}


@pytest.fixture
def labels():
    labels = np.zeros((2, 48, 64), np.uint8)
    labels[0, 10:20, 30:44] = 1
    labels[0, 20:24, 30:44] = 4
    return labels


def outlines(panel):
    """Points (x, y) of each outline of a panel, and its colour."""
    return [
        (
            np.concatenate([path.vertices for path in drawn.get_paths()]),
            to_hex(drawn.get_edgecolor()[0]).upper(),
        )
        for drawn in panel.collections
    ]


def test_outlines_run_around_the_labels_in_millimetres(labels):
    image = np.arange(2 * 48 * 64, dtype=np.float32).reshape(2, 48, 64)
    figure = segmentation_contours(
        image,
        labels,
        {"ours": labels},
        classes=CLASSES,
        spacing=(2.0, 0.5),
        margin=4.0,
        slice_names=["a", "b"],
    )
    first, second = figure.axes
    drawn = outlines(first)
    assert [colour for _, colour in drawn] == [*CLASS_COLOURS[:2], "#FFFFFF", "#FFFFFF"]
    points = drawn[0][0]
    # Rows 10..19 and columns 30..43, cut 2 rows and 8 columns outside of what is labelled.
    np.testing.assert_allclose([points[:, 1].min(), points[:, 1].max()], [2 * 2.0, 12 * 2.0])
    np.testing.assert_allclose([points[:, 0].min(), points[:, 0].max()], [8 * 0.5, 22 * 0.5])
    assert not second.collections  # nothing is labelled on the second slice
    assert first.get_title() == "a"
    assert first.get_ylabel() == "ours"


def test_a_row_for_each_prediction_and_a_column_for_each_slice(labels, tmp_path):
    predictions = {"pretrained": labels, "random": np.zeros_like(labels)}
    figure = segmentation_contours(np.ones(labels.shape), labels, predictions, classes=CLASSES, title="heart")
    assert isinstance(figure, Figure)
    assert len(figure.axes) == 4
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()][:2] == ["ventricle", "myocardium"]
    figure.savefig(tmp_path / "figure.png")  # constant images and empty label maps draw without a warning
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_other_shapes_are_refused(labels):
    with pytest.raises(ValueError, match="one shape"):
        segmentation_contours(np.ones((2, 48, 48)), labels, {"ours": labels}, classes=CLASSES)
