"""Tables behind `data.bands.SENSORS`: one row (name, wavelength um, native gsd m, mean, std) per band.

The statistics normalise input of the unit that is named with them; they are not a substitute for your own
(`--data.bands.mean`, `--data.bands.std`) where your imagery is processed differently.
"""

from itertools import pairwise

Row = tuple[str, float | None, float | None, float, float]

# Centre wavelengths of Sentinel-2A and native gsd: Copernicus Sentinel-2 MSI user guide, spectral responses v3.0.
# Statistics: SSL4EO-S12, Level-1C, 50k patches (Wang et al. 2023, arXiv:2211.07044; values from its repository).
SENTINEL2_L1C: tuple[Row, ...] = (
    ("B01", 0.4427, 60.0, 1605.57504906, 786.78685367),
    ("B02", 0.4924, 10.0, 1390.78157673, 850.34818441),
    ("B03", 0.5598, 10.0, 1314.8729939, 875.06484736),
    ("B04", 0.6646, 10.0, 1363.52445545, 1138.84957046),
    ("B05", 0.7041, 20.0, 1549.44374991, 1122.17775652),
    ("B06", 0.7405, 20.0, 2091.74883118, 1161.59187054),
    ("B07", 0.7828, 20.0, 2371.7172463, 1274.39184232),
    ("B08", 0.8328, 10.0, 2299.90463006, 1248.42891965),
    ("B8A", 0.8647, 20.0, 2560.29504086, 1345.52684884),
    ("B09", 0.9451, 60.0, 830.06605044, 577.31607053),
    ("B10", 1.3735, 60.0, 22.10351321, 51.15431158),
    ("B11", 1.6137, 20.0, 2177.07172323, 1336.09932639),
    ("B12", 2.2024, 20.0, 1524.06546312, 1136.53823676),
)
SENTINEL2_10 = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")

# Statistics: SSL4EO-S12, Level-2A, as above.
SENTINEL2_L2A: tuple[Row, ...] = (
    ("B01", 0.4427, 60.0, 752.40087073, 1108.02887453),
    ("B02", 0.4924, 10.0, 884.29673756, 1155.15170768),
    ("B03", 0.5598, 10.0, 1144.16202635, 1183.6292542),
    ("B04", 0.6646, 10.0, 1297.47289228, 1368.11351514),
    ("B05", 0.7041, 20.0, 1624.90992062, 1370.265037),
    ("B06", 0.7405, 20.0, 2194.6423161, 1355.55390699),
    ("B07", 0.7828, 20.0, 2422.21248945, 1416.51487101),
    ("B08", 0.8328, 10.0, 2517.76053101, 1474.78900051),
    ("B8A", 0.8647, 20.0, 2581.64687018, 1439.3086061),
    ("B09", 0.9451, 60.0, 2645.51888987, 1582.28010962),
    ("B11", 1.6137, 20.0, 2368.51236873, 1455.52084939),
    ("B12", 2.2024, 20.0, 1805.06846033, 1343.48379601),
)

# Wavelengths: USGS band designations of OLI (OLI-2 is built alike). Statistics of B2..B7: the Clay foundation model's
# metadata for Landsat Collection 2 Level-1; B1 is not among them and borrows the statistics of B2.
LANDSAT_L1: tuple[Row, ...] = (
    ("B1", 0.443, 30.0, 11083.0, 5468.0),
    ("B2", 0.482, 30.0, 11083.0, 5468.0),
    ("B3", 0.561, 30.0, 10563.0, 5411.0),
    ("B4", 0.655, 30.0, 10678.0, 6025.0),
    ("B5", 0.865, 30.0, 14792.0, 6746.0),
    ("B6", 1.609, 30.0, 12276.0, 5897.0),
    ("B7", 2.201, 30.0, 10114.0, 4850.0),
)
# The same source, Collection 2 Level-2 surface reflectance (0.0000275 * DN - 0.2); B1 borrows from B2 again.
LANDSAT_SR: tuple[Row, ...] = (
    ("B1", 0.443, 30.0, 12474.0, 10144.0),
    ("B2", 0.482, 30.0, 12474.0, 10144.0),
    ("B3", 0.561, 30.0, 13310.0, 9408.0),
    ("B4", 0.655, 30.0, 13705.0, 9578.0),
    ("B5", 0.865, 30.0, 17801.0, 8277.0),
    ("B6", 1.609, 30.0, 14615.0, 5300.0),
    ("B7", 2.201, 30.0, 12701.0, 4522.0),
)

# Statistics: the Clay foundation model's metadata for NAIP (uint8).
NAIP: tuple[Row, ...] = (
    ("R", 0.650, 1.0, 110.16, 47.23),
    ("G", 0.560, 1.0, 115.41, 39.82),
    ("B", 0.480, 1.0, 98.15, 35.43),
    ("NIR", 0.842, 1.0, 139.04, 49.86),
)

# PlanetScope four-band surface reflectance, bands in the product's order. No public statistics are known to us: these
# are Sentinel-2 L2A's at the nearest wavelength (B02, B03, B04, B8A), which has the same unit. Measure your own.
PLANET: tuple[Row, ...] = (
    ("Blue", 0.490, 3.0, 884.29673756, 1155.15170768),
    ("Green", 0.565, 3.0, 1144.16202635, 1183.6292542),
    ("Red", 0.665, 3.0, 1297.47289228, 1368.11351514),
    ("NIR", 0.865, 3.0, 2581.64687018, 1439.3086061),
)

# VENuS superspectral camera; B5 and B6 see the same wavelength from two angles. No public statistics are known to us:
# these are Sentinel-2 L1C's at the nearest wavelength, for reflectance x 10000. Measure your own.
VENUS: tuple[Row, ...] = (
    ("B1", 0.4239, 5.0, 1605.57504906, 786.78685367),
    ("B2", 0.4469, 5.0, 1605.57504906, 786.78685367),
    ("B3", 0.4919, 5.0, 1390.78157673, 850.34818441),
    ("B4", 0.5550, 5.0, 1314.8729939, 875.06484736),
    ("B5", 0.6197, 5.0, 1363.52445545, 1138.84957046),
    ("B6", 0.6195, 5.0, 1363.52445545, 1138.84957046),
    ("B7", 0.6662, 5.0, 1363.52445545, 1138.84957046),
    ("B8", 0.7020, 5.0, 1549.44374991, 1122.17775652),
    ("B9", 0.7411, 5.0, 2091.74883118, 1161.59187054),
    ("B10", 0.7822, 5.0, 2371.7172463, 1274.39184232),
    ("B11", 0.8611, 5.0, 2560.29504086, 1345.52684884),
    ("B12", 0.9087, 5.0, 2560.29504086, 1345.52684884),
)

# Any uint8 RGB picture. Statistics: ImageNet's, in 0-255 units. The gsd is not a property of the format.
RGB: tuple[Row, ...] = (
    ("R", 0.665, None, 123.675, 58.395),
    ("G", 0.560, None, 116.28, 57.12),
    ("B", 0.490, None, 103.53, 57.375),
)

# fMoW-RGB: statistics of Scale-MAE's pretraining (Reed et al. 2023) and Cross-Scale MAE (Tang et al. 2023), x 255.
FMOW_RGB: tuple[Row, ...] = (
    ("R", 0.665, None, 0.43393 * 255, 0.19828 * 255),
    ("G", 0.560, None, 0.43579 * 255, 0.19250 * 255),
    ("B", 0.490, None, 0.40744 * 255, 0.19455 * 255),
)

# EnMAP Level-2A: 91 VNIR bands, then 133 SWIR bands that begin again at 0.902 um. Wavelengths: DLR's list of spectral
# bands (EnMAP_Spectral_Bands_update.xlsx, as in TorchGeo 0.8.1); they move by some tenths of a nanometre from scene to
# scene, and the EnMAP-Box's table of a 2022 scene differs by at most 0.5 nm.
# fmt: off
_ENMAP_WAVELENGTHS = (
    0.418416, 0.424043, 0.429457, 0.434686, 0.439758, 0.444699, 0.449539, 0.454306, 0.459031, 0.46373, 0.468411,
    0.47308, 0.477744, 0.482411, 0.487087, 0.49178, 0.496497, 0.501243, 0.50602, 0.510829, 0.515672, 0.520551,
    0.525467, 0.530424, 0.535422, 0.540463, 0.545551, 0.550687, 0.555873, 0.561112, 0.566405, 0.571756, 0.577166,
    0.582636, 0.588171, 0.593773, 0.599446, 0.605193, 0.611017, 0.616923, 0.622921, 0.628987, 0.635112, 0.641294,
    0.647537, 0.653841, 0.660207, 0.666637, 0.673131, 0.679691, 0.686319, 0.693014, 0.69978, 0.706617, 0.713524,
    0.720501, 0.727545, 0.734654, 0.741826, 0.74906, 0.756353, 0.763703, 0.771108, 0.778567, 0.786078, 0.793639,
    0.801249, 0.808905, 0.816608, 0.824355, 0.832145, 0.839976, 0.847847, 0.855757, 0.863703, 0.871683, 0.879693,
    0.887729, 0.895789, 0.90387, 0.911968, 0.920081, 0.928204, 0.936335, 0.94447, 0.952608, 0.960748, 0.968892,
    0.977037, 0.985186, 0.993338, 0.901961, 0.911571, 0.92132, 0.931203, 0.941218, 0.95136, 0.961628, 0.972016,
    0.982523, 0.993144, 1.00388, 1.01472, 1.02566, 1.0367, 1.04784, 1.05907, 1.07039, 1.08178, 1.09326, 1.10481,
    1.11643, 1.1281, 1.13984, 1.15162, 1.16344, 1.1753, 1.1872, 1.19911, 1.21105, 1.223, 1.23497, 1.24694, 1.25893,
    1.27092, 1.28292, 1.29491, 1.3069, 1.31888, 1.33085, 1.34282, 1.35476, 1.36669, 1.3786, 1.39048, 1.4611, 1.47274,
    1.48434, 1.49589, 1.5074, 1.51887, 1.53029, 1.54167, 1.55301, 1.5643, 1.57555, 1.58676, 1.59791, 1.60902, 1.62009,
    1.63111, 1.64207, 1.653, 1.66387, 1.6747, 1.68547, 1.6962, 1.70687, 1.7175, 1.72808, 1.7386, 1.74908, 1.75951,
    1.93914, 1.94869, 1.9582, 1.96766, 1.97708, 1.98645, 1.99579, 2.00508, 2.01433, 2.02354, 2.0327, 2.04183, 2.05092,
    2.05996, 2.06897, 2.07793, 2.08686, 2.09574, 2.10459, 2.1134, 2.12217, 2.1309, 2.1396, 2.14826, 2.15688, 2.16547,
    2.17402, 2.18253, 2.19101, 2.19945, 2.20786, 2.21624, 2.22458, 2.23289, 2.24116, 2.2494, 2.25761, 2.26579,
    2.27393, 2.28204, 2.29012, 2.29817, 2.30619, 2.31417, 2.32213, 2.33005, 2.33794, 2.34581, 2.35364, 2.36144,
    2.36921, 2.37695, 2.38466, 2.39234, 2.4, 2.40762, 2.41521, 2.42278, 2.43032, 2.43782, 2.4453,
)
# fmt: on


def _between(rows: tuple[Row, ...], wavelength: float, column: int) -> float:
    """Value of a column at a wavelength (um), linearly between the nearest bands, the outermost band's beyond them."""
    known = sorted((row[1], float(row[column] or 0.0)) for row in rows if row[1] is not None)
    for (left, low), (right, high) in pairwise(known):
        if wavelength <= right:
            share = max(0.0, (wavelength - left) / (right - left))
            return low + share * (high - low)
    return known[-1][1]


# No public statistics per band are known to us: these are Sentinel-2 L2A's, interpolated over wavelength, for the same
# unit (reflectance x 10000). Measure your own.
ENMAP: tuple[Row, ...] = tuple(
    (f"B{number}", wavelength, 30.0, _between(SENTINEL2_L2A, wavelength, 3), _between(SENTINEL2_L2A, wavelength, 4))
    for number, wavelength in enumerate(_ENMAP_WAVELENGTHS, start=1)
)
# The usual choice without the bands of strong water absorption (SpectralEarth, Braham et al. 2024; HySpecNet-11k, Fuchs
# and Demir 2023): B127..B141 and B161..B167 are left out, of which parts are no data in most scenes.
ENMAP_202 = tuple(f"B{number}" for number in (*range(1, 127), *range(142, 161), *range(168, 225)))
