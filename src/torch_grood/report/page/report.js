"use strict";

// Points of two pictures of the same images: what lies under the pointer, or is reached by the arrow keys, is shown.
(() => {
  const data = JSON.parse(document.getElementById("points").textContent);
  const tip = document.getElementById("tip");
  const tile = tip.querySelector(".tile");
  const text = tip.querySelector(".text");
  const spoken = document.getElementById("pointed");
  const views = [...document.querySelectorAll(".points")];
  const hidden = new Set();
  let shown = null;
  const REACH = 18;
  const SHOWN = 112;
  const SVG = "http://www.w3.org/2000/svg";

  if (data.sheet.uri) tile.style.backgroundImage = `url(${data.sheet.uri})`;
  const zoom = SHOWN / data.sheet.side;
  tile.style.width = tile.style.height = `${SHOWN}px`;
  tile.style.backgroundSize = `${data.sheet.width * zoom}px ${data.sheet.height * zoom}px`;
  if (data.sheet.side < 64) tile.classList.add("pixels");

  const sets = data.sets;
  const describe = (i) => {
    const decision = data.is_ood[i] === null ? "" : data.is_ood[i] ? ", flagged" : ", not flagged";
    const p = data.p_value[i] === null ? "" : `, p-value ${data.p_value[i]}`;
    return `${sets[data.set[i]]}\nclassifier: ${data.classes[data.label[i]]}\nscore ${data.score[i]}${p}${decision}\n${data.file[i]}`;
  };

  const rings = views.map((view) => {
    const ring = document.createElementNS(SVG, "circle");
    ring.setAttribute("class", "ring");
    ring.setAttribute("r", "6");
    ring.style.display = "none";
    view.querySelector("svg").append(ring);
    return ring;
  });

  // From the units of a picture to pixels of the window.
  const onScreen = (view, i) => {
    const svg = view.querySelector("svg");
    const [x, y] = data[view.dataset.view][i];
    return new DOMPoint(x, y).matrixTransform(svg.getScreenCTM());
  };

  const put = () => {
    const point = onScreen(shown.view, shown.i);
    const { width, height } = tip.getBoundingClientRect();
    const left = point.x + 16 + width > innerWidth ? point.x - 16 - width : point.x + 16;
    const top = Math.min(Math.max(8, point.y - height / 2), innerHeight - height - 8);
    tip.style.left = `${Math.max(8, left)}px`;
    tip.style.top = `${top}px`;
  };

  const show = (view, i) => {
    shown = { view, i };
    rings.forEach((ring, at) => {
      const [x, y] = data[views[at].dataset.view][i];
      ring.setAttribute("cx", x);
      ring.setAttribute("cy", y);
      ring.style.display = "";
    });
    const [column, row] = [i % data.sheet.columns, Math.floor(i / data.sheet.columns)];
    tile.style.backgroundPosition = `-${column * SHOWN}px -${row * SHOWN}px`;
    text.textContent = describe(i);
    tip.hidden = false;
    put();
  };

  const leave = () => {
    shown = null;
    tip.hidden = true;
    rings.forEach((ring) => { ring.style.display = "none"; });
  };

  const nearest = (view, x, y) => {
    const inverse = view.querySelector("svg").getScreenCTM().inverse();
    const at = new DOMPoint(x, y).matrixTransform(inverse);
    const reach = REACH * inverse.a;
    let [best, found] = [reach * reach, null];
    data[view.dataset.view].forEach(([px, py], i) => {
      const distance = (px - at.x) ** 2 + (py - at.y) ** 2;
      if (distance < best && !hidden.has(data.set[i])) [best, found] = [distance, i];
    });
    return found;
  };

  for (const view of views) {
    // Left to right, as the arrow keys go.
    const order = data.set.map((_, i) => i).sort((a, b) => data[view.dataset.view][a][0] - data[view.dataset.view][b][0]);
    let place = -1;
    const point = (event) => {
      const i = nearest(view, event.clientX, event.clientY);
      if (i === null) leave();
      else { place = order.indexOf(i); show(view, i); }
    };
    view.addEventListener("pointermove", point);
    view.addEventListener("pointerdown", point);
    view.addEventListener("pointerleave", leave);
    view.addEventListener("blur", leave);
    view.addEventListener("keydown", (event) => {
      const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -Infinity, End: Infinity };
      if (event.key === "Escape") { leave(); return; }
      const step = steps[event.key];
      const seen = order.filter((i) => !hidden.has(data.set[i]));
      if (step === undefined || seen.length === 0) return;
      event.preventDefault();
      const from = place < 0 ? (step > 0 ? -1 : seen.length) : seen.indexOf(order[place]);
      const to = Math.min(Math.max(from + step, 0), seen.length - 1);
      place = order.indexOf(seen[to]);
      show(view, seen[to]);
      spoken.textContent = describe(seen[to]).replaceAll("\n", "; ");
    });
  }
  // Focus scrolls too, and the event may come after a key: the tip goes with its point until that is out of sight.
  const follow = () => {
    if (shown === null) return;
    const { x, y } = onScreen(shown.view, shown.i);
    if (x < 0 || y < 0 || x > innerWidth || y > innerHeight) leave();
    else put();
  };
  addEventListener("scroll", follow, { passive: true, capture: true });
  addEventListener("resize", follow);

  for (const box of document.querySelectorAll(".toggles input")) {
    box.addEventListener("change", () => {
      const set = Number(box.dataset.set);
      if (box.checked) hidden.delete(set); else hidden.add(set);
      for (const view of views) {
        view.querySelector(`[id="${view.dataset.view}-set-${set}"]`).classList.toggle("hidden-set", !box.checked);
      }
      leave();
    });
  }
})();
