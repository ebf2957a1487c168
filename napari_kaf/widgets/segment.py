from napari_kaf.widgets._panel import Panel
class SegmentWidget(Panel): pass
