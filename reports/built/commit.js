for (const row of document.querySelectorAll("#summary tr"))
  if (row.cells[0].textContent === "commit") row.cells[1].textContent = "0d61584cdc36";
