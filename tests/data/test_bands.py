import json
import subprocess
import sys

import pytest

from xscale_lightning.data.bands import SENSORS, Band, Bands, BandSelection, band_key, generic
from xscale_lightning.errors import UserError


@pytest.mark.parametrize(
    ("sensor", "count"),
    [
        ("sentinel2_l1c", 13),
        ("sentinel2_l1c_12", 12),
        ("sentinel2_l2a", 12),
        ("sentinel2_10", 10),
        ("sentinel2_rgb", 3),
        ("landsat8", 7),
        ("landsat9", 7),
        ("naip", 4),
        ("planet", 4),
        ("venus", 12),
        ("rgb", 3),
        ("fmow_rgb", 3),
        ("enmap", 224),
        ("enmap_202", 202),
    ],
)
def test_presets_have_their_bands(sensor, count):
    bands = BandSelection(sensor=sensor).resolve()
    assert bands.sensor == sensor
    assert len(bands) == len(bands.names) == len(bands.means) == len(bands.stds) == len(bands.wavelengths) == count
    assert all(0.4 < wavelength < 2.5 for wavelength in bands.wavelengths if wavelength is not None)


def test_every_sensor_survives_the_checkpoint_as_plain_types():
    for bands in SENSORS.values():
        assert Bands.from_dict(json.loads(json.dumps(bands.to_dict()))) == bands


def test_a_broken_record_is_refused():
    with pytest.raises(UserError, match="not a band record"):
        Bands.from_dict({"sensor": "x", "bands": []})


def test_bands_are_selected_by_name_in_the_given_order():
    bands = SENSORS["sentinel2_l1c"].select(["B8A", "B02"])
    assert bands.names == ("B8A", "B02")
    assert bands.wavelengths == [0.8647, 0.4924]
    assert bands.means == [2560.29504086, 1390.78157673]


@pytest.mark.parametrize(("spelling", "name"), [("B1", "B01"), ("b8a", "B8A"), ("B08A", "B8A"), ("B12", "B12")])
def test_spelling_of_sentinel_bands_is_forgiven(spelling, name):
    assert SENSORS["sentinel2_l1c"].select([spelling]).names == (name,)


def test_b8_and_b8a_are_not_confused():
    assert band_key("B8") != band_key("B8A")
    assert band_key("SR_B4") == band_key("B04") == band_key("B4")


def test_missing_bands_are_named_with_those_available():
    with pytest.raises(UserError, match=r"no B10, swir; it has B01, .*B12"):
        SENSORS["sentinel2_l2a"].select(["B02", "B10", "swir"])


@pytest.mark.parametrize(
    ("sensor", "rgb", "false_colour"),
    [
        ("sentinel2_l1c", (3, 2, 1), (7, 3, 2)),
        ("sentinel2_rgb", (0, 1, 2), None),
        ("planet", (2, 1, 0), (3, 2, 1)),
        ("naip", (0, 1, 2), (3, 0, 1)),
        ("landsat8", (3, 2, 1), (4, 3, 2)),
    ],
)
def test_display_channels(sensor, rgb, false_colour):
    assert SENSORS[sensor].rgb == rgb
    assert SENSORS[sensor].false_colour == false_colour


def test_display_channels_without_visible_light():
    assert generic(1).rgb == (0, 0, 0)
    assert generic(5).rgb == (0, 1, 2)
    infrared = SENSORS["sentinel2_l1c"].select(["B8A", "B11", "B12"])
    assert infrared.rgb == (0, 1, 2)
    assert infrared.false_colour is None


def test_gsd_is_the_finest_native_one():
    assert SENSORS["sentinel2_l1c"].gsd == 10.0
    assert SENSORS["sentinel2_l1c"].select(["B11", "B01"]).gsd == 20.0
    assert SENSORS["rgb"].gsd is None


def test_difference_says_what_differs():
    l1c = SENSORS["sentinel2_l1c"]
    assert l1c.difference(l1c) == ""
    assert l1c.difference(l1c.with_statistics([1.0] * 13, [2.0] * 13)) == ""
    assert "missing B10" in l1c.difference(SENSORS["sentinel2_l1c_12"])
    assert "sensor sentinel2_l1c against sentinel2_l2a" in l1c.difference(SENSORS["sentinel2_l2a"])
    assert "order" in l1c.select(["B02", "B03"]).difference(l1c.select(["B03", "B02"]))
    assert "additional B03" in l1c.select(["B02"]).difference(l1c.select(["B02", "B03"]))


def test_selection_takes_own_statistics():
    bands = BandSelection("sentinel2_l1c", ["B04", "B03"], mean=[1, 2], std=[3, 4]).resolve()
    assert (bands.means, bands.stds) == ([1.0, 2.0], [3.0, 4.0])


def test_generic_selection_takes_any_names():
    bands = BandSelection("generic", ["red", "elevation"], mean=[1, 2], std=[3, 4]).resolve()
    assert bands.names == ("red", "elevation")
    assert bands.stds == [3.0, 4.0]
    assert generic(200).names[-1] == "band200"


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (BandSelection("sentinel3"), "bands.sensor: 'sentinel3'"),
        (BandSelection("generic"), "bands.names"),
        (BandSelection("rgb", ["R", "G"], mean=[1.0], std=[1.0, 1.0]), "bands.mean: 1 values for 2 bands"),
        (BandSelection("rgb", mean=[1.0, 1.0, 1.0]), "bands.std: missing"),
        (BandSelection("rgb", mean=[1.0] * 3, std=[1.0, 0.0, 1.0]), "band G has mean 1.0 and std 0.0"),
        (BandSelection("rgb", mean=[float("nan")] * 3, std=[1.0] * 3), "finite"),
        (BandSelection("rgb", ["R", "R"]), "more than once"),
        (BandSelection("rgb", []), "no band"),
    ],
)
def test_wrong_selections_are_refused(selection, message):
    with pytest.raises(UserError, match=message) as error:
        selection.resolve()
    assert len(str(error.value).splitlines()) <= 2


def test_no_bands_at_all_are_refused():
    with pytest.raises(UserError):
        generic(0)
    assert Band("x", None, None, 0.0, 1.0).gsd is None


def test_importing_bands_needs_no_reader():
    code = (
        "import sys, xscale_lightning.data.bands, xscale_lightning.data.views;"
        "bad = {'torchgeo', 'rasterio', 'lightning'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_generic_sensor_needs_only_the_number_of_its_bands():
    bands = BandSelection(sensor="generic", count=369).resolve()
    assert (len(bands), bands.names[0], bands.names[-1]) == (369, "band1", "band369")
    assert bands.wavelengths == [None] * 369
    assert Bands.from_dict(json.loads(json.dumps(bands.to_dict()))) == bands


def test_wavelengths_override_those_of_the_preset_band_by_band():
    bands = BandSelection(sensor="sentinel2_l1c", names=["B04", "B02"], wavelengths=[0.665, 0.492]).resolve()
    assert bands.wavelengths == [0.665, 0.492]
    assert bands.means == SENSORS["sentinel2_l1c"].select(["B04", "B02"]).means
    assert Bands.from_dict(bands.to_dict()) == bands


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sensor": "generic"}, r"bands\.names.*or bands\.count"),
        ({"sensor": "generic", "count": 0}, "0 bands"),
        ({"sensor": "generic", "count": 2, "names": ["red"]}, r"bands\.count: 2 and also 1 bands\.names"),
        ({"sensor": "enmap", "count": 224}, r"bands\.count: 224 is for sensor 'generic'"),
        ({"sensor": "generic", "count": 3, "wavelengths": [0.4]}, "1 values for 3 bands"),
        ({"sensor": "generic", "count": 1, "wavelengths": [490]}, "490 looks like nanometres, write 0.49"),
        ({"sensor": "generic", "count": 1, "wavelengths": [4.9e-7]}, "looks like metres, write 0.49"),
        ({"sensor": "generic", "count": 2, "wavelengths": [0.49, -1]}, "-1 of band band2"),
        ({"sensor": "generic", "count": 1, "wavelengths": [float("nan")]}, "nan of band band1"),
        ({"sensor": "generic", "count": 1, "wavelengths": [0]}, "0 of band band1"),
        ({"sensor": "enmap", "names": ["B225"]}, r"no B225; it has B1, B2, B3, \.\.\., B224 \(224 in all\)"),
    ],
)
def test_counts_and_wavelengths_that_do_not_fit_are_named(options, message):
    with pytest.raises(UserError, match=message):
        BandSelection(**options).resolve()


def test_enmap_has_two_spectrometers_that_overlap_and_leaves_out_water():
    bands = SENSORS["enmap"]
    waves = bands.wavelengths
    assert (waves[0], waves[90], waves[91], waves[223]) == (0.418416, 0.993338, 0.901961, 2.4453)
    assert waves[:91] == sorted(waves[:91]) and waves[91:] == sorted(waves[91:])
    assert [bands.names[i] for i in bands.rgb] == ["B48", "B30", "B16"]
    used = SENSORS["enmap_202"].wavelengths
    assert not [wave for wave in used if 1.29 < wave < 1.52 or 1.73 < wave < 1.97]
    # Statistics lie between those of the Sentinel-2 bands on both sides, and never jump.
    red, edge = (SENSORS["sentinel2_l2a"].select([name]).means[0] for name in ("B04", "B05"))
    assert red < bands.means[49] < edge
    assert max(abs(a - b) for a, b in zip(bands.means[:90], bands.means[1:91], strict=True)) < 150


def test_differences_of_hyperspectral_records_stay_readable():
    difference = SENSORS["enmap"].difference(BandSelection(sensor="generic", count=369).resolve())
    assert "224 in all" in difference and "369 in all" in difference and len(difference) < 200


def test_which_orders_files_without_names_may_have():
    assert [len(order) for order in BandSelection(sensor="enmap_202").file_orders()] == [224, 202]
    assert BandSelection(sensor="enmap", names=["B9", "B3"]).file_orders()[0][:2] == ("B1", "B2")
    assert BandSelection(sensor="generic", names=["red", "nir"]).file_orders() == [("red", "nir")]
    assert BandSelection(sensor="sentinel2_l1c").file_orders() == []  # EuroSAT and fMoW-Sentinel differ
