"""Keypoint-augmented self-supervised segmentation of medical volumes: the engine, without any GUI."""
