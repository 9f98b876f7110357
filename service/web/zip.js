// A ZIP file of images, which are compressed already and therefore stored.
import { crc32 } from "./crc.js";

const UTF8 = 0x0800, JANUARY_1980 = 0x0021;

// `files` are pairs of name and bytes.
export function zip(files) {
  const parts = [], directory = [];
  let offset = 0;
  for (const [name, bytes] of files) {
    const path = new TextEncoder().encode(name);
    const facts = [20, UTF8, 0, 0, JANUARY_1980];  // of 16 bits: version, flags, method, time, date
    const sizes = [crc32(bytes), bytes.length, bytes.length];
    const head = record(0x04034b50, facts, sizes, [path.length, 0]);
    parts.push(head, path, bytes);
    directory.push(record(0x02014b50, [20, ...facts], sizes, [path.length, 0, 0, 0, 0], [0, offset]), path);
    offset += head.length + path.length + bytes.length;
  }
  const size = directory.reduce((sum, part) => sum + part.length, 0);
  const end = record(0x06054b50, [0, 0, files.length, files.length], [size, offset], [0]);
  return new Blob([...parts, ...directory, end], { type: "application/zip" });
}

// Little-endian numbers: a signature of 32 bits, then groups of alternately 16 and 32 bits.
function record(signature, ...groups) {
  const numbers = [[signature, 4], ...groups.flatMap((group, i) => group.map((number) => [number, i % 2 ? 4 : 2]))];
  const bytes = new Uint8Array(numbers.reduce((sum, [, width]) => sum + width, 0)), view = new DataView(bytes.buffer);
  let at = 0;
  for (const [number, width] of numbers) {
    if (width === 4) view.setUint32(at, number, true);
    else view.setUint16(at, number, true);
    at += width;
  }
  return bytes;
}
