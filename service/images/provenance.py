"""Provenance of images: metadata in the image, and a C2PA signature if a key is set."""

import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

from PIL import Image
from PIL.ExifTags import Base

from service.errors import StartError
from service.settings import Settings
from service.version import NAME, VERSION

# IPTC's term for pictures made by a trained model, the same in XMP and C2PA
SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
MAX_PROMPT_CHARACTERS = 2000  # of a prompt; JPEG has room for 64 KB in all
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Provenance:
    """The model, seed and prompt of an image. It holds no time, so that the same image has the same bytes."""

    model: str
    digest: str  # of the model's files
    seed: int
    prompt: str | None = None  # None if images do not hold prompts
    decoder: str = "full"  # or small
    decoder_digest: str | None = None  # of a small decoder's files

    @property
    def software(self) -> str:
        return f"{NAME} {VERSION}"

    @property
    def description(self) -> str:
        return f"model {self.model}, seed {self.seed}, {self.decoder} decoder"


def png_texts(provenance: Provenance) -> dict[str, str]:
    """Return the texts of a PNG by keyword. One is XMP with IPTC's fields, as in the other formats."""
    return {
        "Software": provenance.software,
        "Description": provenance.description,
        "XML:com.adobe.xmp": _xmp(provenance),
    }


def exif_metadata(provenance: Provenance) -> dict[str, Any]:
    """Return arguments for Pillow's `save` of JPEG and WebP: EXIF, and XMP with IPTC's fields."""
    exif = Image.Exif()
    exif[Base.Software] = provenance.software
    exif[Base.ImageDescription] = provenance.description
    return {"exif": exif, "xmp": _xmp(provenance).encode()}


class Signer:
    """Signs images with C2PA. Thread-safe.

    Signatures hold random numbers, so that signed images of one seed have the same pixels but different bytes.
    """

    def __init__(self, certificates: Path, key: Path, algorithm: str, timestamps: str | None = None) -> None:
        """Load the certificates and the key, and sign a test image with them.

        `certificates` is the PEM chain, the signer's own first; `key` is its private key in PEM (PKCS 8). Raises
        StartError if the C2PA library is missing, a file cannot be read, or they cannot sign.
        """
        try:
            import c2pa
        except ImportError:
            raise StartError("c2pa_key: c2pa-python is not installed; pip install '.[c2pa]'") from None
        self._c2pa = c2pa
        try:
            chain, secret = certificates.read_bytes(), key.read_bytes()
            info = c2pa.C2paSignerInfo(algorithm, chain, secret, timestamps)
            self._signer = c2pa.Signer.from_info(info)
            blank = io.BytesIO()
            Image.new("RGB", (8, 8)).save(blank, "PNG")
            self.sign(blank.getvalue(), "png")
        except (OSError, c2pa.C2paError) as error:
            raise StartError(f"c2pa_certificates {certificates} and c2pa_key {key} cannot sign: {error}") from None

    def sign(self, data: bytes, output_format: str) -> bytes:
        """Return the image with a signed manifest. The signature covers the pixels and the metadata."""
        agent = {"name": NAME, "version": VERSION}
        created = {"action": "c2pa.created", "digitalSourceType": SOURCE_TYPE, "softwareAgent": agent}
        manifest = {
            "claim_generator_info": [agent],
            "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [created]}}],
        }
        signed = io.BytesIO()
        with self._c2pa.Builder(json.dumps(manifest)) as builder:
            builder.sign(self._signer, f"image/{output_format}", io.BytesIO(data), signed)
        return signed.getvalue()


def load_signer(settings: Settings) -> Signer | None:
    """Return the signer of the settings, if any. Raises StartError for one that cannot sign."""
    if settings.images.c2pa_certificates is None and settings.images.c2pa_key is None:
        return None
    if settings.images.c2pa_certificates is None or settings.images.c2pa_key is None:
        raise StartError("c2pa_certificates and c2pa_key go together; one of them is missing")
    return Signer(
        settings.images.c2pa_certificates,
        settings.images.c2pa_key,
        settings.images.c2pa_algorithm,
        settings.images.c2pa_timestamp_url,
    )


def _xmp(provenance: Provenance) -> str:
    fields = {
        "xmp:CreatorTool": provenance.software,
        "Iptc4xmpExt:DigitalSourceType": SOURCE_TYPE,
        "Iptc4xmpExt:AISystemUsed": provenance.model,
        "Iptc4xmpExt:AISystemVersionUsed": provenance.digest,
        "fgm:seed": str(provenance.seed),
        "fgm:decoder": provenance.decoder,
    }
    if provenance.decoder_digest is not None:
        fields["fgm:decoderDigest"] = provenance.decoder_digest
    if provenance.prompt is not None:
        fields["Iptc4xmpExt:AIPromptInformation"] = provenance.prompt[:MAX_PROMPT_CHARACTERS]
    attributes = " ".join(f"{name}={quoteattr(_NOT_XML.sub('', value))}" for name, value in fields.items())
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/"'
        ' xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"'
        f' xmlns:fgm="urn:{NAME}" {attributes}/>'
        '</rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
    )
