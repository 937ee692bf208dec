"use strict";

// ---- tables: filter by a column's value or a text, sort by any column ----

const FIRST_ROWS = 200; // more than that is drawn only when asked for
const FEW_ROWS = 10; // not worth a search

function startTable(root) {
  const { columns, rows, filters, initial } = JSON.parse(root.querySelector("script").textContent);
  const controls = root.querySelector(".controls");
  const more = root.querySelector(".more");
  const chosen = { ...initial };
  let text = "";
  let sort = { index: -1, sign: 1 };
  let limit = FIRST_ROWS;

  for (const name of filters) {
    const index = columns.findIndex((column) => column.name === name);
    const values = [...new Set(rows.map((row) => row[index]))].sort();
    if (values.length < 2) continue;
    const select = document.createElement("select");
    select.name = name;
    for (const value of ["", ...values]) select.add(new Option(value === "" ? "all" : value, value));
    select.value = chosen[name] ?? "";
    select.addEventListener("change", () => { chosen[name] = select.value; draw(); });
    controls.append(labelled(name, select));
  }
  if (rows.length > FEW_ROWS) {
    const search = document.createElement("input");
    search.type = "search";
    search.name = "search";
    search.addEventListener("input", () => { text = search.value.toLowerCase(); draw(); });
    controls.append(labelled("search", search));
  }

  const heads = columns.map((column, index) => {
    const head = document.createElement("th");
    head.scope = "col";
    head.className = column.number ? "number" : "";
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = column.name;
    button.title = column.note;
    button.addEventListener("click", () => {
      // The first click brings the worst to the top.
      const first = column.better === "more" || !column.number ? 1 : -1;
      sort = { index, sign: sort.index === index ? -sort.sign : first };
      draw();
    });
    head.append(button);
    return head;
  });
  const line = document.createElement("tr");
  line.append(...heads);
  root.querySelector("thead").append(line);
  more.addEventListener("click", () => { limit = Infinity; draw(); });
  draw();

  function draw() {
    let shown = rows.filter((row) =>
      filters.every((name) => !chosen[name] || row[columns.findIndex((c) => c.name === name)] === chosen[name]) &&
      (!text || row.some((value) => String(value ?? "").toLowerCase().includes(text))));
    if (sort.index >= 0) shown = shown.slice().sort((a, b) => sort.sign * compare(a[sort.index], b[sort.index]));
    heads.forEach((head, index) => {
      const state = index !== sort.index ? "none" : sort.sign > 0 ? "ascending" : "descending";
      head.setAttribute("aria-sort", state);
    });
    const body = document.createDocumentFragment();
    for (const row of shown.slice(0, limit)) {
      const element = document.createElement("tr");
      row.forEach((value, index) => {
        const cell = document.createElement("td");
        cell.textContent = written(value, columns[index]);
        if (columns[index].number) cell.className = "number";
        element.append(cell);
      });
      body.append(element);
    }
    root.querySelector("tbody").replaceChildren(body);
    root.querySelector(".count").textContent = `${shown.length} of ${rows.length} rows`;
    more.hidden = shown.length <= limit;
  }
}

function written(value, column) {
  if (value === null) return "–";
  if (typeof value !== "number") return value;
  return column.digits === null ? value.toPrecision(3) : value.toFixed(column.digits);
}

// Texts such as "inf" stand after the numbers, what is missing stands last.
function compare(a, b) {
  const rank = (value) => (typeof value === "number" ? 0 : value === null ? 2 : 1);
  if (rank(a) !== rank(b)) return rank(a) - rank(b);
  return typeof a === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
}

function labelled(text, element) {
  const label = document.createElement("label");
  label.append(`${text} `, element);
  return label;
}

// ---- the viewer: three linked planes of original, reconstruction and difference ----

const COLUMN = 1, ROW = 3, MULTIPLANAR = 3; // NiiVue's codes of layout and slice type
const DIFFERENCE_SHARE = 0.25; // of the window, as in the pictures
// As in the pictures: zero is black, both sides equally bright.
const DIFFERENCE = {
  R: [168, 24, 0, 208, 255], G: [224, 120, 0, 80, 217], B: [255, 216, 0, 0, 160],
  A: [255, 255, 255, 255, 255], I: [0, 64, 128, 192, 255],
};

async function startViewer(root) {
  const form = root.querySelector(".controls");
  const position = root.querySelector(".position");
  if (!document.createElement("canvas").getContext("webgl2")) {
    position.textContent = "This browser offers no WebGL 2: the viewer stays closed, the pictures show the same planes.";
    return;
  }
  position.textContent = "loading";
  if (!window.niivue) {
    const library = document.createElement("script");
    library.textContent = document.getElementById("niivue-library").textContent;
    document.head.append(library);
  }
  const narrow = window.matchMedia("(max-width: 700px)");
  const names = form.volume.options[0].dataset.recon ? ["original", "reconstruction", "difference"] : ["volume"];
  const panes = [];
  for (const name of names) panes.push(await openPane(root.querySelector(".planes"), name));
  let volumes = [];

  async function show() {
    position.textContent = "loading";
    const { image, recon } = form.volume.selectedOptions[0].dataset;
    const pack = (number) => unpacked(root.querySelector(`[data-pack="${number}"]`).textContent);
    volumes = [await pack(image)];
    if (recon) {
      volumes.push(await pack(recon));
      volumes.push(difference(...volumes));
    }
    panes.forEach(({ nv }, index) => {
      while (nv.volumes.length) nv.removeVolumeByIndex(0);
      nv.addVolume(volumes[index]);
      nv.setSliceType(MULTIPLANAR);
    });
    layOut();
    setWindow();
    setPlane();
  }

  function layOut() {
    const [x, y, z] = [1, 2, 3].map((i) => volumes[0].hdr.dims[i] * volumes[0].hdr.pixDims[i]);
    const row = narrow.matches || panes.length === 1;
    const ratio = row ? (x + x + y) / Math.max(y, z) : Math.max(x, y) / (y + z + z);
    for (const { nv, frame } of panes) {
      frame.style.aspectRatio = String(ratio);
      nv.setMultiplanarLayout(row ? ROW : COLUMN);
      nv.resizeListener();
    }
  }

  function setWindow() {
    const top = Number(form.window.value);
    volumes.forEach((volume, index) => {
      volume.cal_min = index === 2 ? -DIFFERENCE_SHARE * top : 0;
      volume.cal_max = index === 2 ? DIFFERENCE_SHARE * top : top;
    });
    for (const { nv } of panes) nv.updateGLVolume();
    say();
  }

  function setPlane() {
    form.slice.max = volumes[0].hdr.dims[Number(form.plane.value) + 1];
    followCrosshair();
  }

  function moveToSlice() {
    const axis = Number(form.plane.value);
    const at = panes[0].nv.scene.crosshairPos.slice();
    at[axis] = (Number(form.slice.value) - 0.5) / volumes[0].hdr.dims[axis + 1];
    for (const { nv } of panes) { nv.scene.crosshairPos = at.slice(); nv.drawScene(); }
    say();
  }

  function voxel() {
    return [0, 1, 2].map((axis) => {
      const side = volumes[0].hdr.dims[axis + 1];
      return Math.min(side - 1, Math.max(0, Math.floor(panes[0].nv.scene.crosshairPos[axis] * side)));
    });
  }

  function followCrosshair() {
    if (!volumes.length) return;
    form.slice.value = voxel()[Number(form.plane.value)] + 1;
    say();
  }

  function say() {
    const [x, y, z] = voxel();
    const [, nx, ny] = volumes[0].hdr.dims;
    const values = volumes.map((volume, index) => {
      const value = volume.img[x + nx * (y + ny * z)] * volume.hdr.scl_slope;
      return `${names[index]} ${value.toFixed(3)}`;
    });
    position.textContent = `x ${x + 1}, y ${y + 1}, z ${z + 1}: ${values.join(", ")}; white at ${form.window.value}`;
  }

  for (const { nv } of panes) {
    nv.broadcastTo(panes.map((pane) => pane.nv).filter((other) => other !== nv), { "2d": true, crosshair: true });
    nv.onLocationChange = followCrosshair;
  }
  form.volume.addEventListener("change", show);
  form.plane.addEventListener("change", setPlane);
  form.slice.addEventListener("input", moveToSlice);
  form.window.addEventListener("input", setWindow);
  narrow.addEventListener("change", layOut);
  await show();
  root.dataset.ready = "true";
}

async function openPane(parent, name) {
  const figure = document.createElement("figure");
  const frame = document.createElement("div");
  const canvas = document.createElement("canvas");
  const caption = document.createElement("figcaption");
  caption.textContent = name;
  canvas.setAttribute("aria-label", `${name}: axial, coronal and sagittal plane`);
  frame.className = "plane";
  frame.append(canvas);
  figure.append(caption, frame);
  parent.append(figure);
  const nv = new window.niivue.Niivue({
    backColor: [0, 0, 0, 1], crosshairColor: [1, 0.83, 0.3, 0.6], crosshairWidth: 0.5,
    fontColor: [1, 0.83, 0.3, 1], isColorbar: false,
    isRadiologicalConvention: false, loadingText: "", logLevel: "error", multiplanarShowRender: 0,
    sagittalNoseLeft: true, dragMode: 0, isOrientationTextVisible: true, isNearestInterpolation: false,
  });
  await nv.attachToCanvas(canvas);
  nv.addColormap("difference", DIFFERENCE);
  return { nv, frame };
}

function unpacked(base64) {
  return window.niivue.NVImage.loadFromBase64({ base64, name: "volume.nii.gz", cal_min: 0, cal_max: 1 });
}

function difference(image, recon) {
  const volume = recon.clone();
  const slope = recon.hdr.scl_slope;
  volume.img = Float32Array.from(recon.img, (value, index) => (value - image.img[index]) * slope);
  volume.hdr.datatypeCode = 16; // float32
  volume.hdr.numBitsPerVoxel = 32;
  volume.hdr.scl_slope = 1;
  volume.name = "difference";
  volume._colormap = "difference";
  return volume;
}

document.querySelectorAll("[data-table]").forEach(startTable);
for (const viewer of document.querySelectorAll("[data-viewer]")) {
  const seen = new IntersectionObserver((entries) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    seen.disconnect();
    startViewer(viewer).catch((error) => {
      viewer.querySelector(".position").textContent = `The viewer could not start: ${error.message}`;
      console.error(error);
    });
  });
  seen.observe(viewer);
}
