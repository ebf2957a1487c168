from napari_kaf.widgets._panel import Panel
class PretrainWidget(Panel): pass
