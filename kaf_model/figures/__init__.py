"""Figures for papers. Each function returns a matplotlib Figure, drawn without a window or global state."""

from kaf_model.figures.compute import compute_figure
from kaf_model.figures.correspondences import correspondence_figure, radius_figure
from kaf_model.figures.curves import curves_figure
from kaf_model.figures.keypoints import keypoint_figure
from kaf_model.figures.segmentation import segmentation_comparison, segmentation_contours
from kaf_model.figures.similarity import neighbour_similarity_figure, similarity_figure
from kaf_model.figures.style import CLASS_COLOURS, check_format, save_figure

__all__ = [
    "CLASS_COLOURS",
    "check_format",
    "compute_figure",
    "correspondence_figure",
    "curves_figure",
    "keypoint_figure",
    "neighbour_similarity_figure",
    "radius_figure",
    "save_figure",
    "segmentation_comparison",
    "segmentation_contours",
    "similarity_figure",
]
