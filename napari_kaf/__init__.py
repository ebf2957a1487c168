"""The napari plugin: what a person does in the viewer, turned into calls on `kaf_model`."""
