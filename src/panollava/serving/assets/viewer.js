/* A panorama that can be turned, with a heat map and outlines drawn into it: a wrapper around
 * Pannellum 2.5.7. A plain script without a build step; load pannellum.js and pannellum.css first.
 * It works over HTTP and from a file, where pictures have to be data URIs (a browser lets no WebGL
 * read a picture from a file).
 *
 *   const viewer = new PanoramaViewer(element, {label: "Panorama of a desert"});
 *   await viewer.show("data:image/jpeg;base64,...");  // equirectangular; a URL, data URI or Blob
 *   viewer.setMap({width: 90, height: 45, values: "..."});  // null: none
 *   viewer.setStrength(0.7);  // of the map, from 0 to 1
 *   viewer.setOutlines([[[yaw, pitch], ...], ...]);  // closed lines in degrees; []: none
 *   viewer.look(yaw, pitch);  // degrees, yaw grows to the right and pitch upwards
 *   viewer.direction();  // {yaw, pitch} of the center
 *   viewer.destroy();
 *   PanoramaViewer.drawLegend(canvas);  // the colors of the map from 0 to 1, from left to right
 *
 * `show` rejects if the picture cannot be decoded, and keeps map and outlines; a later `show` wins.
 * The `values` of a map are base64 of width x height bytes, 0 to 255, row by row from the zenith,
 * from yaw -180 to 180. `element` needs a height (class "viewer" in style.css has one). Browsers
 * allow about a dozen viewers in a page: with more panoramas, show them in the same viewer, or
 * destroy those that are out of sight.
 *
 * Keys, while the panorama has the focus: arrows turn, + and - zoom. Without WebGL the panorama is
 * shown flat, with map and outlines. */
"use strict";

class PanoramaViewer {
  constructor(element, {label = "Panorama", flat = false} = {}) {
    this.element = element;
    this._canvas = document.createElement("canvas"); // what Pannellum shows
    this._picture = this._map = this._viewer = null;
    this._outlines = [];
    this._strength = 0.8;
    this._shown = 0;
    this._flat = flat || !PanoramaViewer.hasWebGL();
    const keys = this._flat ? "" : ". Arrow keys turn it, plus and minus zoom.";
    element.setAttribute("role", this._flat ? "img" : "application");
    element.setAttribute("aria-label", label + keys);
  }

  static hasWebGL() {
    return Boolean(document.createElement("canvas").getContext("webgl"));
  }

  async show(source) {
    const mine = ++this._shown;
    const url = source instanceof Blob ? URL.createObjectURL(source) : source;
    const picture = new Image();
    try {
      picture.src = url;
      await picture.decode();
    } finally {
      if (url !== source) URL.revokeObjectURL(url);
    }
    if (mine !== this._shown) return;
    this._picture = picture;
    const width = Math.min(picture.naturalWidth, PanoramaViewer.MAX_WIDTH);
    // Outlines and map are drawn into the picture: a small one is enlarged for them.
    this._canvas.width = Math.max(width, PanoramaViewer.MIN_WIDTH);
    this._canvas.height = Math.round(this._canvas.width / 2);
    this._draw();
  }

  setMap(map) {
    this._map = map && PanoramaViewer._colored(map);
    this._draw();
  }

  setStrength(strength) {
    this._strength = strength;
    this._draw();
  }

  setOutlines(outlines) {
    this._outlines = outlines;
    this._draw();
  }

  look(yaw, pitch, animated = 0) {
    if (this._viewer) this._viewer.lookAt(pitch, yaw, undefined, animated);
  }

  direction() {
    if (!this._viewer) return {yaw: 0, pitch: 0};
    return {yaw: this._viewer.getYaw(), pitch: this._viewer.getPitch()};
  }

  destroy() {
    this._shown++; // a `show` that still loads comes too late
    if (this._viewer) this._viewer.destroy();
    this._viewer = this._picture = null;
    this.element.replaceChildren();
  }

  static drawLegend(canvas) {
    const context = canvas.getContext("2d");
    context.clearRect(0, 0, canvas.width, canvas.height);
    for (let x = 0; x < canvas.width; x++) {
      const [r, g, b] = PanoramaViewer._color(x / (canvas.width - 1));
      context.fillStyle = `rgb(${r} ${g} ${b})`;
      context.fillRect(x, 0, 1, canvas.height);
    }
  }

  _draw() {
    if (!this._picture) return;
    const {width, height} = this._canvas;
    const context = this._canvas.getContext("2d");
    context.drawImage(this._picture, 0, 0, width, height);
    if (this._map && this._strength > 0) {
      context.globalAlpha = this._strength;
      context.imageSmoothingQuality = "high";
      const columns = this._map.width - 2; // one more at each end, from across the seam
      context.drawImage(this._map, 1, 0, columns, this._map.height, 0, 0, width, height);
      context.globalAlpha = 1;
    }
    this._outlines.forEach((outline, index) => this._drawOutline(context, outline, index));
    this._update();
  }

  _drawOutline(context, outline, index) {
    const {width, height} = this._canvas;
    context.beginPath();
    let before = null;
    let beforeY = 0;
    for (const [yaw, pitch] of [...outline, outline[0]]) {
      const x = ((((yaw + 180) % 360) + 360) % 360 / 360) * width;
      const y = ((90 - pitch) / 180) * height;
      if (before === null) {
        context.moveTo(x, y);
      } else if (Math.abs(x - before) > width / 2) { // across the seam: once at each end
        const turn = x > before ? width : -width;
        context.lineTo(x - turn, y);
        context.moveTo(before + turn, beforeY);
        context.lineTo(x, y);
      } else {
        context.lineTo(x, y);
      }
      before = x;
      beforeY = y;
    }
    const color = PanoramaViewer.OUTLINES[index % PanoramaViewer.OUTLINES.length];
    for (const [style, share] of [["rgb(0 0 0 / 60%)", 500], [color, 1000]]) {
      context.strokeStyle = style;
      context.lineWidth = width / share;
      context.lineJoin = "round";
      context.stroke();
    }
  }

  _update() {
    if (this._flat) {
      if (this._canvas.parentNode !== this.element) this.element.replaceChildren(this._canvas);
      this._canvas.className = "flat";
    } else if (this._viewer) {
      this._viewer.setUpdate(false); // draws it once
    } else {
      this._viewer = pannellum.viewer(this.element, {
        type: "equirectangular",
        panorama: this._canvas,
        dynamic: true,
        autoLoad: true,
        hfov: 100,
        minHfov: 30,
        mouseZoom: "fullscreenonly", // the wheel scrolls the page
        touchPanSpeedCoeffFactor: 1.5,
      });
      this._viewer.setUpdate(false); // loads the canvas
      const canvas = this._viewer.getRenderer().getCanvas();
      canvas.addEventListener("webglcontextlost", () => this._showFlat());
    }
  }

  _showFlat() {
    if (!this._viewer) return;
    const viewer = this._viewer;
    this._viewer = null;
    viewer.destroy();
    this._flat = true;
    this._update();
  }

  /* A canvas with the colors of a map, one column wider at each end. */
  static _colored({width, height, values}) {
    const bytes = Uint8Array.from(atob(values), (letter) => letter.charCodeAt(0));
    const canvas = document.createElement("canvas");
    canvas.width = width + 2;
    canvas.height = height;
    const context = canvas.getContext("2d");
    const pixels = context.createImageData(width + 2, height);
    for (let row = 0; row < height; row++) {
      for (let column = 0; column < width + 2; column++) {
        const value = bytes[row * width + ((column - 1 + width) % width)] / 255;
        const [r, g, b] = PanoramaViewer._color(value);
        const alpha = 255 * Math.min(0.8, 1.6 * value); // what lies below stays visible
        pixels.data.set([r, g, b, alpha], 4 * (row * (width + 2) + column));
      }
    }
    context.putImageData(pixels, 0, 0);
    return canvas;
  }

  static _color(value) {
    const colors = PanoramaViewer.COLORS;
    const place = Math.min(Math.max(value, 0), 1) * (colors.length - 1);
    const index = Math.min(Math.floor(place), colors.length - 2);
    return colors[index].map((each, channel) =>
      Math.round(each + (colors[index + 1][channel] - each) * (place - index)));
  }
}

/* Matplotlib's inferno: lightness grows evenly, also for the color-blind and in gray. */
PanoramaViewer.COLORS = [
  [0, 0, 4], [31, 12, 72], [85, 15, 109], [136, 34, 106], [186, 54, 85], [227, 89, 51],
  [249, 140, 10], [249, 201, 50], [252, 255, 164],
];
/* Okabe and Ito's colors, which the color-blind can tell apart. */
PanoramaViewer.OUTLINES = ["#56b4e9", "#e69f00", "#f0e442", "#cc79a7", "#009e73", "#ffffff"];
PanoramaViewer.MAX_WIDTH = 4096;
PanoramaViewer.MIN_WIDTH = 2048;
