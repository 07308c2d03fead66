// Colours before the first paint: a classic script in the head, so that a remembered choice never flashes the other one.
"use strict";
(() => {
  const read = () => {
    try {
      return localStorage.getItem("dqe-theme");
    } catch {
      return null; // storage is refused: the system's colours
    }
  };
  const theme = read();
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
})();
