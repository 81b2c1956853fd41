"""The feature store: what extraction writes and detection reads. See docs/store.md."""

from tad.store.api import Store, open_store
from tad.store.exporters import ExportReport, export_features
from tad.store.feature import Feature
from tad.store.fingerprint import fingerprint_of
from tad.store.importers import ImportReport, import_features
from tad.store.layout import Level
from tad.store.pack import pack_h5, pack_zip
from tad.store.verify import VerifyReport

__all__ = [
    "ExportReport",
    "Feature",
    "ImportReport",
    "Level",
    "Store",
    "VerifyReport",
    "export_features",
    "fingerprint_of",
    "import_features",
    "open_store",
    "pack_h5",
    "pack_zip",
]
