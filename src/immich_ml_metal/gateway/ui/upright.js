// Pictures as Immich sends them: upright. A phone's file lies on its side with a note of it (EXIF),
// which browsers obey and models do not see.

const HEAD_BYTES = 262144; // the note stands near the beginning
const EXIF = 0x45786966; // "Exif"
const LITTLE = 0x4949; // "II"
const ORIENTATION = 0x0112;

export async function upright(file) {
  if (!isTurned(new DataView(await file.slice(0, HEAD_BYTES).arrayBuffer()))) return file;
  const bitmap = await createImageBitmap(file);
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
  return canvas.convertToBlob({ type: "image/jpeg", quality: 0.98 });
}

function isTurned(view) {
  for (let at = 0; at + 14 < view.byteLength; at += 1) {
    if (view.getUint32(at) === EXIF && view.getUint16(at + 4) === 0) return orientation(view, at + 6) > 1;
  }
  return false;
}

// The tag's value in the first table of a TIFF header; 1, upright, where it has none.
function orientation(view, start) {
  const little = view.getUint16(start) === LITTLE;
  const table = start + view.getUint32(start + 4, little);
  if (table + 2 > view.byteLength) return 1;
  const last = table + 2 + 12 * view.getUint16(table, little);
  for (let entry = table + 2; entry < last && entry + 10 <= view.byteLength; entry += 12) {
    if (view.getUint16(entry, little) === ORIENTATION) return view.getUint16(entry + 8, little);
  }
  return 1;
}
