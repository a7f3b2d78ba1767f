"""Rasters that lead elsewhere, never end, or claim more than they hold: left out in no time, and nothing is asked."""

import json
import os
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.transform import from_origin

from xscale_lightning.data.geotiff import UnreadableFile, inspect, open_raster
from xscale_lightning.data.image_files import FileStore, decode
from xscale_lightning.data.inspection import Finding, check_file

ADDRESS = "http://127.0.0.1:9/x.tif"
SECONDS = 5.0
PLACED = {"driver": "GTiff", "dtype": "uint16", "crs": "EPSG:32633", "transform": from_origin(0, 0, 10, 10)}
AUX = '<PAMDataset><Metadata domain="OVERVIEWS"><MDI key="OVERVIEW_FILE">{}</MDI></Metadata></PAMDataset>'


def virtual(source: str, relative: int = 0, band: str = "") -> str:
    return (
        f'<VRTDataset rasterXSize="32" rasterYSize="32"><VRTRasterBand dataType="UInt16" band="1"{band}><SimpleSource>'
        f'<SourceFilename relativeToVRT="{relative}">{source}</SourceFilename><SourceBand>1</SourceBand>'
        "</SimpleSource></VRTRasterBand></VRTDataset>"
    )


TEXTS = {
    "address.vrt": virtual(f"/vsicurl/{ADDRESS}"),
    "address.tif": virtual(f"/vsicurl/{ADDRESS}"),
    "plain.vrt": virtual(ADDRESS),
    "blank.vrt": virtual(f"  {ADDRESS}"),
    "encoded.vrt": virtual("&#47;vsicurl/http://127.0.0.1:9/x"),
    "database.vrt": virtual("PG:host=127.0.0.1 port=9 dbname=x"),
    "inline.vrt": virtual("&lt;VRTDataset/&gt;"),
    "itself.vrt": virtual("itself.vrt", 1),
    "zero.vrt": virtual("/dev/zero"),
    "nothing.vrt": virtual("gone.tif", 1),
    "raw.vrt": virtual("good.tif", 1, ' subClass="VRTRawRasterBand"'),
    "program.vrt": virtual("good.tif", 1).replace("<Simple", "<PixelFunctionLanguage>Python</P><Simple"),
    "empty.vrt": '<VRTDataset rasterXSize="2000000000" rasterYSize="2000000000"/>',
    "service.tif": f'<GDAL_WMS><Service name="TMS"><ServerUrl>{ADDRESS}</ServerUrl></Service></GDAL_WMS>',
    "marked.tif": f"\ufeff\n <GDAL_WMTS>{ADDRESS}</GDAL_WMTS>",
    "catalogue.tif": json.dumps({"stac_version": "1.0.0", "type": "Feature", "assets": {"a": {"href": ADDRESS}}}),
    "deep.vrt": "<VRTDataset>" + "<a>" * 100_000,
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    for name in ("good", "notes", "overview"):
        with rasterio.open(tmp_path / f"{name}.tif", "w", count=1, height=32, width=32, **PLACED) as file:
            file.write(np.random.default_rng(0).integers(1, 3000, (1, 32, 32)).astype(np.uint16))
    monkeypatch.setattr(socket.socket, "connect", lambda *given: pytest.fail("opened a connection"))
    return tmp_path


def refused(path: Path) -> str:
    """By the reader of scenes and by `doctor`."""
    begun = time.monotonic()
    with pytest.raises(UnreadableFile) as caught, open_raster(str(path)) as file:
        file.read()
    with pytest.raises(UnreadableFile):
        inspect(str(path))
    assert check_file(Finding(str(path))).kind is not None
    assert time.monotonic() - begun < SECONDS
    return caught.value.reason


@pytest.mark.parametrize("name", TEXTS)
def test_rasters_that_lead_elsewhere(folder, name):
    (folder / name).write_text(TEXTS[name])
    assert "cannot be opened as a raster" not in refused(folder / name), "GDAL has looked at it"


@pytest.mark.parametrize("beside", ["good.tif.ovr", "good.tif.msk", "good.tif.aux.xml", "good.tfw"])
def test_pipes_and_devices(folder, beside):
    os.mkfifo(folder / "pipe.tif")
    (folder / "zero.tif").symlink_to("/dev/zero")
    for name in ("pipe.tif", "zero.tif"):
        refused(folder / name)
        with pytest.raises(OSError, match="it is no file"):
            FileStore(str(folder)).read(name)
    os.mkfifo(folder / beside)
    assert beside in refused(folder / "good.tif")


def test_what_viewers_write_beside_an_image(folder):
    for name, fits in ((":::BASE:::overview.tif", True), (f"/vsicurl/{ADDRESS}", False), ("../../x.ovr", False)):
        (folder / "notes.tif.aux.xml").write_text(AUX.format(name))
        if fits:
            assert inspect(str(folder / "notes.tif")).width == 32
        else:
            assert "elsewhere" in refused(folder / "notes.tif")


def test_virtual_rasters_of_files_are_read(folder):
    (folder / "one.vrt").write_text(virtual("good.tif", 1))
    (folder / "two.vrt").write_text(virtual(str(folder / "one.vrt")))
    for name in ("one.vrt", "two.vrt"):
        with open_raster(str(folder / name)) as file, open_raster(str(folder / "good.tif")) as wanted:
            assert np.array_equal(file.read(), wanted.read())
    assert check_file(Finding(str(folder / "two.vrt"))).kind is None


def test_images_that_claim_more_than_their_file_holds(folder):
    sparse = {"tiled": True, "blockxsize": 4096, "blockysize": 4096, "SPARSE_OK": True}
    with rasterio.open(folder / "large.tif", "w", count=1, height=200_000, width=200_000, **PLACED, **sparse):
        pass
    assert "claims" in refused(folder / "large.tif")
    with pytest.raises(OSError, match="claims"):
        decode("large.tif", (folder / "large.tif").read_bytes())
    with (folder / "terabyte.tif").open("wb") as file:
        file.truncate(2**40)
    refused(folder / "terabyte.tif")
    with pytest.raises(OSError, match="far more than an image"):
        FileStore(str(folder)).read("terabyte.tif")


def test_a_text_among_labelled_images_is_no_image(folder):
    for text in (TEXTS["service.tif"], TEXTS["address.vrt"], virtual(str(folder / "good.tif"))):
        with pytest.raises(OSError, match="not recognized"):
            decode("a/x.tif", text.encode())
