/* The gallery of the report: one panorama at a time can be turned, with the map of one answer. */
"use strict";

(() => {
  const maps = JSON.parse(document.getElementById("maps").textContent);
  let open = null; // {card, viewer, image}: the panorama that can be turned

  function close() {
    if (!open) return;
    open.viewer.destroy();
    open.place.replaceChildren(open.image);
    setPressed(open.card, null);
    open.card.querySelector(".turn").setAttribute("aria-pressed", "false");
    open = null;
  }

  async function show(card) {
    if (open && open.card === card) return open.viewer;
    close();
    const place = card.querySelector(".place");
    const image = place.querySelector("img");
    const element = document.createElement("div");
    element.className = "viewer";
    element.tabIndex = 0;
    place.replaceChildren(element);
    const viewer = new PanoramaViewer(element, {label: image.alt});
    open = {card, viewer, place, image};
    card.querySelector(".turn").setAttribute("aria-pressed", "true");
    await viewer.show(image.src);
    return viewer;
  }

  /* Mark the answer whose map is shown; null: none. */
  function setPressed(card, button) {
    for (const each of card.querySelectorAll("button.answer")) {
      each.setAttribute("aria-pressed", String(each === button));
    }
    card.querySelector(".map-controls").hidden = button === null;
  }

  async function toggleMap(card, button, map) {
    const viewer = await show(card);
    if (button.getAttribute("aria-pressed") === "true") {
      setPressed(card, null);
      viewer.setMap(null);
      return;
    }
    setPressed(card, button);
    viewer.setStrength(Number(card.querySelector(".strength").value));
    viewer.setMap(map);
    const {yaw, pitch} = strongest(map);
    viewer.look(yaw, pitch / 2);
  }

  /* The direction with the highest value, in degrees. */
  function strongest({width, height, values}) {
    const bytes = atob(values);
    let best = 0;
    for (let place = 1; place < bytes.length; place++) {
      if (bytes.charCodeAt(place) > bytes.charCodeAt(best)) best = place;
    }
    return {
      yaw: ((best % width + 0.5) / width) * 360 - 180,
      pitch: 90 - ((Math.floor(best / width) + 0.5) / height) * 180,
    };
  }

  document.documentElement.classList.add("scripting");
  for (const card of document.querySelectorAll(".panorama")) {
    PanoramaViewer.drawLegend(card.querySelector(".legend"));
    card.querySelector(".turn").addEventListener("click", () => {
      if (open && open.card === card) close();
      else show(card);
    });
    card.querySelector(".strength").addEventListener("input", (event) => {
      if (open && open.card === card) open.viewer.setStrength(Number(event.target.value));
    });
    for (const answer of card.querySelectorAll(".answer")) {
      const map = (maps[card.dataset.number] || [])[answer.dataset.row];
      if (!map) continue;
      const button = document.createElement("button");
      button.type = "button";
      button.className = "answer";
      button.textContent = answer.textContent;
      button.setAttribute("aria-pressed", "false");
      button.addEventListener("click", () => toggleMap(card, button, map));
      answer.replaceWith(button);
    }
  }
})();
