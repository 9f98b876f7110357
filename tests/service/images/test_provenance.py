"""Metadata and signatures of images."""

import base64
import datetime
import io
import xml.etree.ElementTree as ElementTree

import c2pa
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from PIL import Image
from PIL.ExifTags import Base

from service.app import create_app
from service.errors import StartError
from service.images.encode import encode
from service.images.provenance import MAX_PROMPT_CHARACTERS, SOURCE_TYPE, Provenance
from service.settings import Settings

FORMATS = ["png", "jpeg", "webp"]
PIXELS = np.arange(48 * 64 * 3, dtype=np.uint8).reshape(48, 64, 3)
ORIGIN = Provenance("scenes-student", "d1ge57", 7, 'a "red" <circle> & \x00 a 星', "small", "5ma11")


def _attributes(data: bytes) -> dict[str, str]:
    """Return the XMP's fields, read by an independent parser."""
    packet = Image.open(io.BytesIO(data)).info["xmp"]
    description = next(
        iter(ElementTree.fromstring(packet).iter("{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description"))
    )
    return {name.rpartition("}")[2]: value for name, value in description.attrib.items()}


@pytest.mark.parametrize("output_format", FORMATS)
def test_metadata_is_readable_and_keeps_the_pixels(output_format):
    data, plain = encode(PIXELS, output_format, 90, ORIGIN), encode(PIXELS, output_format, 90)
    fields = _attributes(data)
    assert fields["CreatorTool"].startswith("flow-generator-matching ")
    assert fields["DigitalSourceType"] == SOURCE_TYPE
    assert (fields["AISystemUsed"], fields["AISystemVersionUsed"], fields["seed"]) == ("scenes-student", "d1ge57", "7")
    assert (fields["decoder"], fields["decoderDigest"]) == ("small", "5ma11")
    assert fields["AIPromptInformation"] == 'a "red" <circle> &  a 星'  # XML has no NUL
    image = Image.open(io.BytesIO(data))
    assert np.array_equal(image, Image.open(io.BytesIO(plain)))
    software = image.info["Software"] if output_format == "png" else image.getexif()[Base.Software]
    assert software == ORIGIN.software
    assert encode(PIXELS, output_format, 90, ORIGIN) == data


@pytest.mark.parametrize("output_format", FORMATS)
def test_the_longest_prompt_fits_in_the_metadata(output_format):
    data = encode(PIXELS, output_format, 90, Provenance("m", "d", 0, '"' * 32_000))
    assert _attributes(data)["AIPromptInformation"] == '"' * MAX_PROMPT_CHARACTERS


@pytest.mark.parametrize(
    ("policy", "told", "prompt"), [("none", False, False), ("origin", True, False), ("prompt", True, True)]
)
def test_the_setting_chooses_the_metadata(serve, connect, policy, told, prompt):
    client = connect(serve(images={"provenance": policy}))
    answer = client.images.generate(prompt="a secret", n=2, extra_body={"seed": 5})
    datas = [base64.b64decode(each.b64_json) for each in answer.data]
    assert all(("xmp" in Image.open(io.BytesIO(data)).info) is told for data in datas)
    assert all((b"a secret" in data) is prompt for data in datas)
    if told:
        assert [_attributes(data)["seed"] for data in datas] == ["5", "6"]


@pytest.fixture(scope="module")
def credentials(tmp_path_factory):
    """Return a certificate chain and key of a test authority."""
    folder = tmp_path_factory.mktemp("credentials")
    authority, own = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    chain = _certificate("leaf", own, authority, False) + _certificate("authority", authority, authority, True)
    (folder / "chain.pem").write_bytes(chain)
    pkcs8 = own.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "key.pem").write_bytes(pkcs8)
    return {"c2pa_certificates": folder / "chain.pem", "c2pa_key": folder / "key.pem"}


def _certificate(
    name: str, key: ec.EllipticCurvePrivateKey, signer: ec.EllipticCurvePrivateKey, authority: bool
) -> bytes:
    def called(text: str) -> x509.Name:
        names = (x509.NameOID.COMMON_NAME, text), (x509.NameOID.ORGANIZATION_NAME, "Tests")
        return x509.Name([x509.NameAttribute(*each) for each in names])

    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder(called("authority"), called(name), key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(authority, None), True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        .add_extension(x509.KeyUsage(True, False, False, False, False, authority, authority, False, False), True)
    )
    if not authority:
        builder = builder.add_extension(x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.EMAIL_PROTECTION]), False)
    return builder.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def test_signatures_are_valid_until_the_image_changes(serve, connect, credentials):
    client = connect(serve(images=credentials))
    for output_format in FORMATS:
        answer = client.images.generate(prompt="x", n=4, output_format=output_format, extra_body={"seed": 1})
        for each in answer.data:
            data = base64.b64decode(each.b64_json)
            with c2pa.Reader(f"image/{output_format}", io.BytesIO(data)) as reader:
                assert reader.get_validation_state() == "Valid"
                manifest = reader.get_active_manifest()
            actions = next(a for a in manifest["assertions"] if a["label"] == "c2pa.actions.v2")["data"]["actions"]
            assert actions[0]["digitalSourceType"] == SOURCE_TYPE
            assert _attributes(data)["AISystemUsed"] == "simulator"
            tampered = data.replace(b"simulator", b"somebody!")  # in the labels, which the signature covers
            assert tampered != data
            with c2pa.Reader(f"image/{output_format}", io.BytesIO(tampered)) as reader:
                assert reader.get_validation_state() == "Invalid"


def test_credentials_that_cannot_sign_are_refused_at_start(credentials, tmp_path):
    with pytest.raises(StartError, match="one of them is missing"):
        create_app(Settings(images={"c2pa_key": credentials["c2pa_key"]}))
    with pytest.raises(StartError, match="cannot sign"):
        create_app(Settings(images=credentials | {"c2pa_key": tmp_path / "none.pem"}))
    (tmp_path / "key.pem").write_text("no key")
    with pytest.raises(StartError, match="cannot sign"):
        create_app(Settings(images=credentials | {"c2pa_key": tmp_path / "key.pem"}))
