for (const row of document.querySelectorAll("#summary tr"))
  if (row.cells[0].textContent === "commit") row.cells[1].textContent = "3f432e8ecc68";
