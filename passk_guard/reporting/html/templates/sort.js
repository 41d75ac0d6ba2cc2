// Sorts tables by the buttons in their headings.
"use strict";
for (const button of document.querySelectorAll("table.sortable th button")) {
  button.addEventListener("click", () => {
    const heading = button.closest("th");
    const row = heading.parentElement;
    const body = heading.closest("table").tBodies[0];
    const column = Array.prototype.indexOf.call(row.children, heading);
    const numeric = heading.classList.contains("number");
    const rising = heading.getAttribute("aria-sort") === (numeric ? "descending" : "none") ||
      !heading.hasAttribute("aria-sort") && !numeric;
    for (const other of row.children) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", rising ? "ascending" : "descending");
    const key = (line) => line.children[column].dataset.sort;
    const compare = (a, b) => {
      const x = key(a), y = key(b);
      if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
      const order = numeric ? Number(x) - Number(y) : x.localeCompare(y);
      return rising ? order : -order;
    };
    body.append(...Array.from(body.rows).sort(compare));
  });
}
