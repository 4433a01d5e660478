for (const row of document.querySelectorAll("#summary tr"))
  if (row.cells[0].textContent === "commit") row.cells[1].textContent = "4169a3ade13b";
