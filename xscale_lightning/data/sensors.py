"""Tables behind `data.bands.SENSORS`: one row (name, wavelength um, native gsd m, mean, std) per band.

The statistics normalise input of the unit that is named with them; they are not a substitute for your own
(`--data.bands.mean`, `--data.bands.std`) where your imagery is processed differently.
"""

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
